"""Find the refusal direction of a chat model. Run with --help, or with --model_id demo."""

from refusal_direction.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
