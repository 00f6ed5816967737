"""Proof that a demo model's refusal direction is real: what the model does with prompts that nothing was fitted on.

    python -m refusal_direction.demo.evaluate
    python -m refusal_direction.demo.evaluate --vlm      images with text

Extracts the direction with every setting at its default, then completes the held-out test prompts greedily: as they are,
with the direction ablated, and with it added.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, Rules
from refusal_direction.demo import PROMPTS_DIR
from refusal_direction.engine.interventions import ablated, steered
from refusal_direction.models.chat import ChatModel
from refusal_direction.models.refusal_tokens import is_refusal
from refusal_direction.pipeline import Direction, RunResult, extract
from refusal_direction.prompts.files import read_prompts
from refusal_direction.prompts.sets import Prompt

__all__ = ["RefusalRates", "held_out", "main", "refusal_rates", "report"]


@dataclass(frozen=True)
class RefusalRates:
    """Shares of held-out prompts that are refused."""

    plain: Mapping[str, float]
    """Of each kind, without intervention."""
    harmful_ablated: float
    harmless_steered: float


def held_out(rules: Rules) -> dict[str, Sequence[Prompt]]:
    """The test prompts by kind: "harmful", "harmless"; and with images "neutral", a mere question about a dangerous object."""
    if rules.images:
        from refusal_direction.demo.vision.pairs import KINDS, demo_pairs  # brings Pillow, which text does not need

        return {kind: demo_pairs(kind, splits=("test",)) for kind in KINDS}
    return {kind: read_prompts(PROMPTS_DIR / f"{kind}_test.json") for kind in ("harmful", "harmless")}


def refusal_rates(chat: ChatModel, direction: Direction, prompts: Mapping[str, Sequence[Prompt]]) -> RefusalRates:
    """Complete the prompts as they are, with the direction ablated, and with it added; count the refusals."""

    def rate(kind: str) -> float:
        return sum(map(is_refusal, chat.complete(prompts[kind], max_new_tokens=12))) / len(prompts[kind])

    plain = {kind: rate(kind) for kind in prompts}
    with ablated(chat.model, direction.vector):
        harmful_ablated = rate("harmful")
    with steered(chat.model, direction.vector, layer=direction.layer):
        harmless_steered = rate("harmless")
    return RefusalRates(plain, harmful_ablated, harmless_steered)


def report(extraction: RunResult) -> str:
    """What was selected, and how many of the held-out prompts are refused, in words."""
    chosen, prompts = extraction.selection.score, held_out(extraction.config.rules)
    rates = refusal_rates(extraction.chat, extraction.direction, prompts)
    changed = {
        "harmful": f", with the direction ablated {rates.harmful_ablated:.0%}",
        "harmless": f", with the direction added {rates.harmless_steered:.0%}",
    }
    return "\n".join(
        [
            f"Selected: position {chosen.position}, layer {chosen.layer}: ablation {chosen.ablation_refusal:.2f}, "
            f"steering {chosen.steering_refusal:.2f}, KL {chosen.kl_div:.3f}",
            *(
                f"Refused of {len(prompts[kind])} {kind} prompts: {share:.0%}{changed.get(kind, '')}"
                for kind, share in rates.plain.items()
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a demo model's refusals of held-out prompts.")
    parser.add_argument("--vlm", action="store_true", help="the vision-language demo")
    config = VISION_CONFIG if parser.parse_args().vlm else Config()
    print(report(extract(DEMO_MODEL, config)))


if __name__ == "__main__":
    main()
