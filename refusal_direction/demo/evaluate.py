"""Proof that the demo model's refusal direction is real: what the model does with prompts that nothing was fitted on.

    python -m refusal_direction.demo.evaluate

Extracts the direction with every setting at its default, then completes the held-out test prompts greedily: as they are,
with the direction ablated, and with it added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from refusal_direction.config import DEMO_MODEL
from refusal_direction.demo import PROMPTS_DIR
from refusal_direction.engine.interventions import ablated, steered
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import is_refusal
from refusal_direction.pipeline import Direction, extract
from refusal_direction.prompts.files import read_prompts

__all__ = ["RefusalRates", "held_out", "refusal_rates"]


@dataclass(frozen=True)
class RefusalRates:
    """Shares of held-out prompts that are refused."""

    harmful: float
    harmless: float
    harmful_ablated: float
    harmless_steered: float


def held_out(kind: str) -> list[str]:
    """The test prompts of a kind, "harmful" or "harmless"."""
    return [prompt.text for prompt in read_prompts(PROMPTS_DIR / f"{kind}_test.json")]


def refusal_rates(chat: ChatModel, direction: Direction) -> RefusalRates:
    """Complete the test prompts as they are, with the direction ablated, and with it added; count the refusals."""

    def rate(requests: Sequence[str]) -> float:
        return sum(map(is_refusal, chat.complete(requests, max_new_tokens=12))) / len(requests)

    harmful, harmless = held_out("harmful"), held_out("harmless")
    plain = rate(harmful), rate(harmless)
    with ablated(chat.model, direction.vector):
        harmful_ablated = rate(harmful)
    with steered(chat.model, direction.vector, layer=direction.layer):
        harmless_steered = rate(harmless)
    return RefusalRates(*plain, harmful_ablated, harmless_steered)


def main() -> None:
    extraction = extract(DEMO_MODEL)
    rates = refusal_rates(extraction.chat, extraction.direction)
    chosen = extraction.selection.score
    print(f"position {chosen.position}, layer {chosen.layer}: ablation {chosen.ablation_refusal:.2f}, ", end="")
    print(f"steering {chosen.steering_refusal:.2f}, KL {chosen.kl_div:.3f}")
    print(
        f"refused of {len(held_out('harmful'))} harmful prompts:  {rates.harmful:.0%}, ablated {rates.harmful_ablated:.0%}"
    )
    print(
        f"refused of {len(held_out('harmless'))} harmless prompts: {rates.harmless:.0%}, steered {rates.harmless_steered:.0%}"
    )


if __name__ == "__main__":
    main()
