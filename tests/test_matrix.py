"""The support matrix: for every family the engine equals a slow oracle, or the tool refuses it and says why.

The oracle (tests/oracles/stream.py, one_by_one.py) is told where a family's layers are, not what writes into their stream.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from refusal_direction.engine.interventions import ResidualStream, ablated
from refusal_direction.errors import UnsupportedModelError
from tests.families import FAMILIES, build, each_family, layers_of
from tests.families.document import PATH, document, documented_lines, documented_version, line
from tests.families.examination import Finding, examine, is_there, row_names
from tests.families.tables import CORE, TEXT_FAMILIES, UNTRIED, VISION_FAMILIES, words
from tests.families.vision import build_vision
from tests.oracles import reference, stream
from tests.problems import as_inputs, known

SCORE_TOLERANCE = 1e-4
LEAK_TOLERANCE = 1e-5
CONTROL = 20
"""How many times the tolerance what is not tolerated has to be, for the comparison to mean something."""

TABLES = {"text": TEXT_FAMILIES, "vision": VISION_FAMILIES}


def rows(names: Iterable[tuple[str, str]]) -> pytest.MarkDecorator:
    """One test for each; module scope brings those of one family together, which are then examined once."""
    each = [pytest.param(*row, marks=() if row in CORE else pytest.mark.extended) for row in names]
    return pytest.mark.parametrize(("kind", "name"), each, ids=str, scope="module")


every_row = rows(row_names())
refused_row = rows(row for row in row_names() if TABLES[row[0]][row[1]].refused)

# libraries that this machine has not: the families' own slower code runs instead
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::UserWarning:transformers.*")


def finding_of(kind: str, name: str) -> Finding:
    if not is_there(kind, name):
        pytest.skip(f"transformers {transformers.__version__} has no {TABLES[kind][name].model_type}")
    return examine(kind, name)


@every_row
def test_scores_and_stream_are_the_oracles_or_the_family_is_refused_with_the_reason(kind: str, name: str) -> None:
    finding, refused = finding_of(kind, name), TABLES[kind][name].refused
    if refused:
        assert re.search(refused, finding.refusal), finding.refusal or "it was not refused"
        return
    assert not finding.refusal
    assert finding.moved > CONTROL * SCORE_TOLERANCE
    assert finding.plain > CONTROL * LEAK_TOLERANCE
    assert finding.difference < SCORE_TOLERANCE
    assert finding.leak < LEAK_TOLERANCE


@refused_row
def test_a_refused_family_is_not_ablated_by_hand_either(kind: str, name: str) -> None:
    if not is_there(kind, name):
        pytest.skip(f"transformers {transformers.__version__} has no {TABLES[kind][name].model_type}")
    model = build(TEXT_FAMILIES[name]) if kind == "text" else build_vision(VISION_FAMILIES[name])
    with pytest.raises(UnsupportedModelError, match=TABLES[kind][name].refused), ablated(model, torch.ones(32)):
        pass


# The page


@every_row
def test_documented_row_is_what_is_found(kind: str, name: str) -> None:
    finding, row = finding_of(kind, name), documented_lines().get((kind, name), "")
    expected = line(kind, name, finding)
    if documented_version() != transformers.__version__:  # submodules may have other names there
        expected, row = (re.sub("`[^|]*`", "...", text) for text in (expected, row))
    assert row == expected, "run: python -m tests.families"


def test_page_is_made_of_its_rows_and_nothing_else() -> None:
    """Which rows those are, the test above says."""
    found = documented_lines()
    assert set(found) == set(row_names())
    assert PATH.read_text("utf-8") == document(found, documented_version()), "run: python -m tests.families"


def test_the_core_has_every_trait_and_every_reason_that_several_families_share() -> None:
    assert set(row_names()) >= CORE
    shared = {value for name, value in vars(words).items() if name.isupper()}
    core = [TABLES[kind][name] for kind, name in CORE]
    assert {one for one in shared if not any(one in row.notable or one == row.refused for row in core)} == set()
    assert {("text", name) for name in FAMILIES} <= CORE


def test_readme_has_the_counts_of_the_page() -> None:
    counts = re.search(r"\d+ text and \d+ vision-language configurations", PATH.read_text("utf-8"))
    readme = (PATH.parents[1] / "README.md").read_text("utf-8")
    assert counts
    assert counts[0] in readme.replace("\n", " ")
    assert "docs/families.md" in readme


def test_every_model_type_of_transformers_is_in_the_tables() -> None:
    listed = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known_types = {family.model_type for table in TABLES.values() for family in table.values()}
    assert not known_types & UNTRIED.keys()
    missing = sorted(listed - known_types - UNTRIED.keys())
    if documented_version() != transformers.__version__:
        pytest.skip(f"transformers {transformers.__version__} has also: {', '.join(missing) or 'nothing'}")
    assert not missing


# The oracle


@each_family()
def test_cleaning_the_stream_operator_by_operator_is_ablating_the_known_writes(name: str) -> None:
    """Two oracles that know nothing of each other: what a person read in the source, and every addition."""
    family = FAMILIES[name]
    model, u = build(family), torch.randn(32)
    inputs, layers = as_inputs(list(range(20, 30))), layers_of(model, family)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
        with reference.ablated(known(model, family), u):
            expected = model(**inputs, use_cache=False).logits
        with stream.purged(layers, u):
            cleaned = model(**inputs, use_cache=False).logits
    assert torch.allclose(cleaned, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2, rtol=1e-2)
    assert not any("forward" in layer.__dict__ for layer in layers)


@pytest.mark.parametrize("name", ["minimax", "bert", "opt (norms after)"])
def test_norm_on_the_stream_brings_the_direction_back_unless_it_is_ablated_too(name: str) -> None:
    """Control: that the oracle is told of these norms matters, and that the package finds them."""
    family = TEXT_FAMILIES[name]
    model, u = build(family), torch.randn(32)
    layers, inputs = layers_of(model, family), as_inputs(list(range(20, 30)))
    found = ResidualStream(model).writes
    assert all(set(family.norms) <= {site.module for site in writes} for writes in found)
    others = {site.module for writes in found for site in writes} - {*family.norms}
    with pytest.MonkeyPatch.context() as patch:
        without = [tuple(site for site in writes if site.module in others) for writes in found]
        residual = ResidualStream(model)
        patch.setattr(residual, "writes", without)
        with residual.ablated(u / u.norm()), stream.followed(layers, u, family.norms) as leaks, torch.no_grad():
            model(**inputs, use_cache=False)
    assert leaks.worst > 0.01


def test_a_sum_that_is_only_read_is_not_the_stream() -> None:
    """Zamba 2 adds shared attention to what its state space reads; that sum does not come back."""
    family = TEXT_FAMILIES["zamba2"]
    model, u = build(family), torch.randn(32)
    layers, inputs = layers_of(model, family), as_inputs(list(range(20, 30)))
    with ablated(model, u), stream.followed(layers, u) as leaks, torch.no_grad():
        model(**inputs, use_cache=False)
    assert len(leaks.additions) == len(layers)
