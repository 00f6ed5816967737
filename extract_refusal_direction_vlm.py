"""Find the refusal direction of a vision-language model. Run with --help, or with --model_id demo."""

from refusal_direction.cli import main_vlm

if __name__ == "__main__":
    raise SystemExit(main_vlm())
