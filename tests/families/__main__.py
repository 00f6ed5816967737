"""Examine every family and write docs/families.md."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from tests.families.document import PATH, document, line, summary
from tests.families.examination import examine, is_there, row_names


def main() -> int:
    missing = [name for kind, name in row_names() if not is_there(kind, name)]
    if missing:
        print(f"Nothing is written: the installed transformers lacks {', '.join(missing)}.", file=sys.stderr)
        return 1
    rows = {row: line(*row, examine(*row)) for row in row_names()}
    PATH.write_text(document(rows), "utf-8")
    print(f"{PATH.name}: {summary(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
