"""`python -m refusal_direction`: the text pipeline's command line."""

from refusal_direction.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
