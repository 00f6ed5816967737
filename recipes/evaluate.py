"""Measures how often a demo model refuses held-out prompts, without and with interventions on its refusal direction.

    python -m recipes.evaluate
    python -m recipes.evaluate --vlm      images with text

Extracts the direction with every setting at its default. Then completes the test prompts greedily: all of them without
intervention, the harmful ones with the direction ablated, and the harmless ones with it added. Neither the model nor the
direction was fitted on these prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from refusal_direction import ChatModel, Direction, RunResult, ablated, extract, steered
from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, ModelSource
from refusal_direction.demo import PROMPTS_DIR
from refusal_direction.models.loading import load
from refusal_direction.models.refusal_tokens import is_refusal
from refusal_direction.prompts import Prompt, read_prompts

__all__ = ["RefusalRates", "demo_config", "held_out", "main", "refusal_rates", "report"]

MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class RefusalRates:
    """Shares of held-out prompts that the model refuses."""

    plain: Mapping[str, float]
    """Without intervention, for each kind of prompts."""
    harmful_ablated: float
    harmless_steered: float


def demo_config(*, images: bool) -> Config:
    """The configuration of a run on a demo model, with every other setting at its default."""
    return replace(VISION_CONFIG if images else Config(), model=ModelSource(DEMO_MODEL))


def held_out(*, images: bool) -> dict[str, Sequence[Prompt]]:
    """The test prompts by kind: "harmful" and "harmless"; with images also "neutral", questions that ask for no help."""
    if images:
        from refusal_direction.demo.vision.pairs import KINDS
        from refusal_direction.prompts.pairs import demo_test_pairs  # loads `datasets`, which text does not need

        return {kind: demo_test_pairs(kind) for kind in KINDS}
    return {kind: read_prompts(PROMPTS_DIR / f"{kind}_test.json") for kind in ("harmful", "harmless")}


def refusal_rates(chat: ChatModel, direction: Direction, prompts: Mapping[str, Sequence[Prompt]]) -> RefusalRates:
    """Complete the prompts without intervention, with the direction ablated and with it added, and count refusals."""

    def rate(kind: str) -> float:
        completions = chat.complete(prompts[kind], max_new_tokens=MAX_NEW_TOKENS)
        return sum(map(is_refusal, completions)) / len(completions)

    plain = {kind: rate(kind) for kind in prompts}
    with ablated(chat.model, direction.vector):
        harmful_ablated = rate("harmful")
    with steered(chat.model, direction.vector, layer=direction.layer):
        harmless_steered = rate("harmless")
    return RefusalRates(plain, harmful_ablated, harmless_steered)


def report(found: RunResult, rates: RefusalRates, counts: Mapping[str, int]) -> str:
    """The selected direction with its scores, and a line with the refusal rates of each kind of prompts."""
    score = found.selection.score
    changed = {
        "harmful": f", with the direction ablated {rates.harmful_ablated:.0%}",
        "harmless": f", with the direction added {rates.harmless_steered:.0%}",
    }
    return "\n".join(
        [
            f"Selected: position {score.position}, layer {score.layer}: ablation {score.ablation_refusal:.2f}, "
            f"steering {score.steering_refusal:.2f}, KL {score.kl_div:.3f}",
            *(
                f"Refused of {counts[kind]} {kind} prompts: {share:.0%}{changed.get(kind, '')}"
                for kind, share in rates.plain.items()
            ),
        ]
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure how often a demo model refuses held-out prompts.")
    parser.add_argument("--vlm", action="store_true", help="the vision-language demo")
    images = parser.parse_args().vlm
    config, prompts = demo_config(images=images), held_out(images=images)
    chat = load(config)
    found = extract(chat, config)
    rates = refusal_rates(chat, found.direction, prompts)
    print(report(found, rates, {kind: len(group) for kind, group in prompts.items()}))


if __name__ == "__main__":
    main()
