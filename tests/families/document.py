"""docs/families.md, the support matrix as a table."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import transformers

from tests.families.examination import Finding, row_names
from tests.families.tables import TEXT_FAMILIES, UNTRIED, VISION_FAMILIES

__all__ = ["PATH", "document", "documented_lines", "documented_version", "line", "summary"]

PATH = Path(__file__).parents[2] / "docs" / "families.md"

_OPENING = """\
# Model families

Written by `python -m tests.families` with transformers {version}; `pytest -m "" tests/test_matrix.py` checks each row, and that
this table still says what is found.

For every row a tiny model with random weights is built. **Exact** means: refusal scores, steering scores, KL and candidates
of the engine agree within 1e-4 with an oracle that runs one candidate and one prompt at a time through the model's own
forward and cleans the residual stream after every addition, operator by operator, without being told which modules write
into it; and under ablation no more than 1e-5 of the stream lies along the direction after any addition. **Refused** means:
`UnsupportedModelError` says why, and nothing is computed.

{summary}

Writes are the submodules of a decoder layer whose outputs are ablated, where layers differ in kind those of each kind.
"""
_HEAD = "| model type | its layers | engine | residual writes | status |\n|---|---|---|---|---|\n"
_UNTRIED = """\
## Not tried

The other model types that transformers lists as causal or image-text-to-text models. A run on one of them still compares the
engine with the model's own forward, and ends with an error where an ablated stream holds some of the direction.

| model type | why there is no row |
|---|---|
"""


def line(kind: str, name: str, finding: Finding) -> str:
    """One row of the table."""
    notable = (TEXT_FAMILIES[name] if kind == "text" else VISION_FAMILIES[name]).notable
    if finding.refusal:
        status = f"refused: {_in_short(finding.refusal)}"
        return f"| {name} | {notable} |  |  | {status} |"
    writes = "; ".join(", ".join(f"`{write}`" for write in one) for one in finding.writes)
    return f"| {name} | {notable} | {finding.engine} | {writes} | exact |"


def _in_short(refusal: str) -> str:
    """The first clause of an error."""
    return re.split(r"[:.] ", refusal, maxsplit=1)[0]


def summary(rows: dict[tuple[str, str], str]) -> str:
    """The counts, in a sentence."""
    counts = {
        kind: Counter(row.split("|")[3].strip() or "refused" for (of, _), row in rows.items() if of == kind)
        for kind in ("text", "vision")
    }
    exact = {kind: count["layer-major"] + count["hooked"] for kind, count in counts.items()}
    hooked = sum(count["hooked"] for count in counts.values())
    return (
        f"{exact['text']} text and {exact['vision']} vision-language configurations are exact ({hooked} of them by hooked "
        f"forwards), {sum(count['refused'] for count in counts.values())} are refused."
    )


def document(rows: dict[tuple[str, str], str], version: str = transformers.__version__) -> str:
    """The whole page, of the rows that were found with this version of transformers."""
    parts = [_OPENING.format(version=version, summary=summary(rows))]
    for kind, title in (("text", "Text"), ("vision", "Images with text")):
        lines = [row for (of, _), row in sorted(rows.items()) if of == kind]
        parts.append(f"## {title}\n\n{_HEAD}" + "\n".join(lines) + "\n")
    parts.append(_UNTRIED + "\n".join(f"| {name} | {why} |" for name, why in sorted(UNTRIED.items())) + "\n")
    return "\n".join(parts)


def documented_lines() -> dict[tuple[str, str], str]:
    """The rows of the page as it stands."""
    text, _, vision = PATH.read_text("utf-8").partition("## Images with text")
    found = {}
    for kind, part in (("text", text), ("vision", vision.partition("## Not tried")[0])):
        for row in part.splitlines():
            name = row.removeprefix("| ").split(" | ")[0]
            if row.startswith("| ") and (kind, name) in row_names():
                found[kind, name] = row
    return found


def documented_version() -> str:
    """The version of transformers with which the page was written."""
    found = re.search(r"with transformers (\S+);", PATH.read_text("utf-8"))
    return found[1] if found else ""
