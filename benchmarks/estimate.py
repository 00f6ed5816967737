"""What `inspect` estimates against the run that follows: the demos, the 55M-parameter Gemma of scoring.py, real models.

    python benchmarks/estimate.py [--data_dir data] [--large] [--models Qwen/Qwen2.5-Coder-0.5B-Instruct]

Each pair runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from apart import apart
from scoring import random_gemma, tokenizer_for

from refusal_direction.config import DEMO_MODEL, VISION_CONFIG, Config, ModelSource, PromptSource
from refusal_direction.estimate import Range, inspect
from refusal_direction.pipeline import extract


def large(folder: Path, options: argparse.Namespace) -> Config:
    """The random Gemma of scoring.py as a folder; a random model refuses nothing, so the filter is skipped."""
    random_gemma(options.layers).save_pretrained(folder)
    tokenizer_for(options.data_dir, options.tokenizer).save_pretrained(folder)
    source = PromptSource(n_train=options.n_train, n_val=options.n_val, data_dir=options.data_dir)
    return Config(model=ModelSource(str(folder), dtype="float32"), prompts=source, skip_filter=True)


def real(model: str, options: argparse.Namespace) -> Config:
    source = PromptSource(n_train=options.n_train, n_val=options.n_val, data_dir=options.data_dir)
    return Config(model=ModelSource(model), prompts=source, skip_filter=options.skip_filter)


def _pair(name: str, options: argparse.Namespace) -> tuple[Range, float, float, int, int]:
    """Seconds estimated, spent on the estimate and taken by the run; bytes estimated and taken."""
    with tempfile.TemporaryDirectory() as folder:
        demo = {"demo": Config(), "vision demo": VISION_CONFIG}
        if name in demo:
            config = replace(demo[name], model=replace(demo[name].model, model_id=DEMO_MODEL))
        else:
            config = large(Path(folder), options) if name == "large" else real(name, options)
        begin = time.perf_counter()
        cost = inspect(config).cost
        estimating = time.perf_counter() - begin - cost.load_seconds
        begin = time.perf_counter()
        memory = extract(config.model.model_id, config).peak_memory_bytes
        return cost.seconds, estimating, time.perf_counter() - begin, cost.memory, memory


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="*", default=(), help="real chat models, instead of the demos")
    arguments.add_argument("--skip_filter", action="store_true", help="for the real models")
    arguments.add_argument("--large", action="store_true", help="the 55M-parameter Gemma too: some minutes")
    arguments.add_argument("--data_dir", type=Path, default=Path("data"))
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--n_train", type=int, default=128)
    arguments.add_argument("--n_val", type=int, default=32)
    arguments.add_argument("--tokenizer", help="folder of a tokenizer with a chat template, for the large one")
    options = arguments.parse_args()
    for name in options.models or ("demo", "vision demo", *(["large"] if options.large else [])):
        seconds, estimating, took, memory, peak = apart(_pair, name, options)
        print(
            f"{name}: estimated {seconds.low:.1f} to {seconds.high:.1f} s, took {took:.1f} s (ratios "
            f"{seconds.low / took:.2f} to {seconds.high / took:.2f}); the estimate took {estimating:.1f} s beside loading; memory "
            f"estimated {memory / 2**20:.0f} MiB, taken {peak / 2**20:.0f} MiB ({memory / peak:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
