"""`ablated` and `steered`: what they do to a running model, and that they leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from refusal_direction.engine.interventions import ablated, steered
from refusal_direction.errors import UnsupportedModelError
from tests.families import D_MODEL, FAMILIES, N_LAYERS, build, layers_of
from tests.oracles import reference, stream
from tests.problems import known

TOLERANCE = 2e-5
some_families = pytest.mark.parametrize("name", ["llama", "gemma2", "falcon", "opt"])
PROMPTS = torch.randint(12, 160, (3, 8), generator=torch.Generator().manual_seed(4))


def direction(seed: int = 0, rows: int | None = None) -> Tensor:
    shape = (D_MODEL,) if rows is None else (rows, D_MODEL)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = PROMPTS) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def same(some: Tensor, others: Tensor) -> bool:
    return bool((some - others).abs().max() < TOLERANCE * others.abs().max())


@some_families
def test_ablated_is_the_reference_ablation(name: str) -> None:
    model, r = build(FAMILIES[name]), direction()
    plain = logits(model)
    with reference.ablated(known(model, FAMILIES[name]), r):
        expected = logits(model)
    with ablated(model, r):
        assert same(logits(model), expected)
    assert not same(plain, expected)


@some_families
def test_ablating_twice_is_ablating_once(name: str) -> None:
    model, r = build(FAMILIES[name]), direction()
    with ablated(model, r):
        once = logits(model)
        with ablated(model, r):
            assert same(logits(model), once)


@some_families
@pytest.mark.parametrize("factor", [-1.0, 5.0, 0.01])
def test_ablation_depends_on_the_line_only(name: str, factor: float) -> None:
    model, r = build(FAMILIES[name]), direction()
    with ablated(model, r):
        expected = logits(model)
    with ablated(model, factor * r):
        assert same(logits(model), expected)


@some_families
def test_ablating_a_zero_direction_changes_nothing(name: str) -> None:
    model = build(FAMILIES[name])
    with ablated(model, torch.zeros(D_MODEL)):
        assert same(logits(model), plain := logits(model))
    assert same(plain, logits(model))


@some_families
@pytest.mark.parametrize("rows", [(None, None), (3, None), (None, 3), (3, 3)])
def test_nested_ablations_leave_nothing_along_any_of_their_directions(
    name: str, rows: tuple[int | None, int | None]
) -> None:
    """Though the directions are not orthogonal: taking off the second must put back nothing along the first."""
    model = build(FAMILIES[name])
    first, second = direction(0, rows[0]), 0.5 * direction(0, rows[0]) + direction(1, rows[1])
    layers = layers_of(model, FAMILIES[name])
    for r in (first, second):
        with ablated(model, first), ablated(model, second), stream.followed(layers, r) as leaks:
            logits(model)
        assert leaks.worst < 1e-5
    with ablated(model, second), stream.followed(layers, first) as control:
        logits(model)
    assert control.worst > 1e-2


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_ablating_again_in_another_precision_is_ablating_once(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """What rounding sets the two apart by is no direction of its own."""
    model, r = build(FAMILIES["llama"]), direction()
    first, again = (r.to(dtype) for dtype in dtypes)
    with ablated(model, first):
        once = logits(model)
        with ablated(model, -3 * again):
            assert same(logits(model), once)


def test_nested_directions_for_different_numbers_of_rows_are_refused() -> None:
    model = build(FAMILIES["llama"])
    with (
        ablated(model, direction(rows=3)),
        pytest.raises(ValueError, match="2 directions within 3"),
        ablated(model, direction(rows=2)),
    ):
        pass


@some_families
def test_what_steering_adds_along_an_ablated_direction_is_taken_off_whichever_comes_first(name: str) -> None:
    model, r = build(FAMILIES[name]), direction()
    with ablated(model, r):
        expected = logits(model)
    with ablated(model, r), steered(model, r, layer=1):
        assert same(logits(model), expected)
    with steered(model, r, layer=1), ablated(model, r):
        assert same(logits(model), expected)
    with steered(model, r, layer=1):
        assert not same(logits(model), expected)  # control


def test_a_length_whose_square_float32_does_not_hold_is_no_matter() -> None:
    model, r = build(FAMILIES["llama"]), direction()
    with ablated(model, r):
        expected = logits(model)
    with ablated(model, 1e30 * r):
        assert same(logits(model), expected)


def test_a_direction_in_half_precision_is_ablated_as_well_as_another() -> None:
    model, r = build(FAMILIES["llama"]), direction().bfloat16()
    with ablated(model, r.float()):
        expected = logits(model)
    with ablated(model, r):
        assert torch.equal(logits(model), expected)


@some_families
def test_row_with_its_own_direction_is_as_when_alone(name: str) -> None:
    model, r = build(FAMILIES[name]), direction(rows=3)
    with ablated(model, r):
        together = logits(model)
    with steered(model, r, layer=2):
        steered_together = logits(model)
    for row in range(3):
        with ablated(model, r[row]):
            assert same(together[row], logits(model, PROMPTS[row : row + 1])[0])
        with steered(model, r[row], layer=2):
            assert same(steered_together[row], logits(model, PROMPTS[row : row + 1])[0])


@some_families
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_steered_adds_the_direction_to_the_input_of_its_layer_only(name: str, layer: int) -> None:
    model, r = build(FAMILIES[name]), direction()
    plain = _inputs(model, layers_of(model, FAMILIES[name]))
    with steered(model, r, layer=layer, coefficient=-1.5):
        changed = _inputs(model, layers_of(model, FAMILIES[name]))
    for below in range(layer):
        assert torch.equal(changed[below], plain[below])
    assert torch.allclose(changed[layer], plain[layer] - 1.5 * r, atol=1e-6)


def _inputs(model: PreTrainedModel, layers: nn.ModuleList) -> list[Tensor]:
    """The stream at the input of each layer, after whatever is done to it there."""
    with stream.followed(layers, torch.ones(D_MODEL)):
        seen: list[Tensor] = []
        following = [layer.forward for layer in layers]
        for layer, forward in zip(layers, following, strict=True):

            def keeping(*args: object, forward: Callable[..., object] = forward, **kwargs: object) -> object:
                hidden = args[0] if args else kwargs["hidden_states"]
                assert isinstance(hidden, Tensor)
                seen.append(hidden.clone())
                return forward(*args, **kwargs)

            layer.forward = keeping  # type: ignore[method-assign]
        logits(model)
    return seen


@some_families
def test_steering_forth_and_back_changes_nothing(name: str) -> None:
    model, r = build(FAMILIES[name]), direction()
    plain = logits(model)
    with steered(model, r, layer=1), steered(model, r, layer=1, coefficient=-1):
        assert same(logits(model), plain)
    with steered(model, r, layer=1):
        assert not same(logits(model), plain)


@some_families
def test_generation_under_ablation_is_a_loop_of_ablated_forwards(name: str) -> None:
    """One token at a time, with a cache of keys and values, every new token is ablated too."""
    model, r = build(FAMILIES[name]), direction(rows=3)
    with ablated(model, r):
        ids = PROMPTS
        for _ in range(5):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
        made = model.generate(
            input_ids=PROMPTS,
            attention_mask=torch.ones_like(PROMPTS),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
    assert torch.equal(made, ids)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "glm4"])
def test_bfloat16_leaves_rounding_only(name: str) -> None:
    family, r = FAMILIES[name], direction()
    model = build(family, dtype=torch.bfloat16)
    with ablated(model, r), stream.followed(layers_of(model, family), r) as leaks:
        logits(model)
    assert leaks.worst < 4 * torch.finfo(torch.bfloat16).eps
    with stream.followed(layers_of(model, family), r) as control:
        logits(model)
    assert control.worst > 10 * leaks.worst


@contextmanager
def _ablating(model: PreTrainedModel) -> Iterator[None]:
    with ablated(model, direction()):
        yield


@contextmanager
def _steering(model: PreTrainedModel) -> Iterator[None]:
    with steered(model, direction(), layer=1):
        yield


Context = Callable[[PreTrainedModel], AbstractContextManager[None]]
both = pytest.mark.parametrize("context", [_ablating, _steering])


def _hooks(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@both
def test_model_is_itself_again_after_the_context(context: Context) -> None:
    model = build(FAMILIES["gemma2"])
    plain, weights = logits(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    with context(model):
        assert _hooks(model) > 0
        assert not same(logits(model), plain)
    assert _hooks(model) == 0
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@both
def test_model_is_itself_again_after_a_failure_in_the_context(context: Context) -> None:
    model = build(FAMILIES["gemma2"])
    plain = logits(model)
    with pytest.raises(KeyboardInterrupt), context(model):
        raise KeyboardInterrupt
    assert _hooks(model) == 0
    assert torch.equal(logits(model), plain)


@both
def test_contexts_change_only_the_model_they_are_given(context: Context) -> None:
    model, other = build(FAMILIES["llama"]), build(FAMILIES["llama"])
    plain = logits(other)
    with context(model):
        assert torch.equal(logits(other), plain)


def test_direction_is_not_changed() -> None:
    model, r = build(FAMILIES["llama"]), direction(rows=3)
    before = r.clone()
    with ablated(model, r), steered(model, r, layer=0, coefficient=3.0):
        logits(model)
    assert torch.equal(r, before)


def test_layer_that_the_model_has_not_is_an_index_error() -> None:
    model = build(FAMILIES["llama"])
    with pytest.raises(IndexError, match="There is no layer -1"), steered(model, direction(), layer=-1):
        pass
    with pytest.raises(IndexError), steered(model, direction(), layer=N_LAYERS):
        pass
    assert _hooks(model) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_direction_may_have_any_dtype(dtype: torch.dtype) -> None:
    model, r = build(FAMILIES["llama"]), torch.ones(D_MODEL)  # exact in every dtype
    with ablated(model, r):
        expected = logits(model)
    with ablated(model, r.to(dtype)):
        changed = logits(model)
    assert changed.dtype == torch.float32
    assert (changed - expected).abs().max() < 0.05 * expected.abs().max()


def test_zero_direction_in_half_precision_changes_nothing() -> None:
    model = build(FAMILIES["llama"])
    plain = logits(model)
    with ablated(model, torch.zeros(D_MODEL, dtype=torch.float16)):
        assert same(logits(model), plain)


def test_directions_for_another_number_of_rows_are_refused() -> None:
    model = build(FAMILIES["llama"])
    with pytest.raises((ValueError, RuntimeError)), ablated(model, direction(rows=2)):
        logits(model, PROMPTS[:, :6])  # 3 rows of 6 tokens are not 2 rows of 9


@pytest.mark.parametrize("context", [ablated, lambda model, r: steered(model, r, layer=1)])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(7),
        torch.ones(1),
        torch.ones(2, 3, 32),
        torch.ones(32, dtype=torch.long),
        torch.full((32,), torch.nan),
    ],
    ids=["size", "one number", "axes", "integers", "not a number"],
)
def test_what_is_no_direction_is_refused(context: Callable[..., Any], wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="A direction"), context(build(FAMILIES["llama"]), wrong):
        pass


@pytest.mark.parametrize("context", [ablated, partial(steered, layer=1)])
def test_what_is_no_tensor_is_refused(context: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"Direction\.vector"), context(build(FAMILIES["llama"]), [1.0] * D_MODEL):
        pass


@pytest.mark.parametrize("layer", ["1", 1.0, None, True])
def test_a_layer_that_is_no_whole_number_is_named(layer: Any) -> None:
    with (
        pytest.raises(TypeError, match="layer must be the index of a layer, a whole number, not"),
        steered(build(FAMILIES["llama"]), direction(), layer=layer),
    ):
        pass


@pytest.mark.parametrize("coefficient", ["2", None])
def test_a_coefficient_of_another_type_is_named(coefficient: Any) -> None:
    with (
        pytest.raises(ValueError, match=f"must be a finite number, not {coefficient!r}"),
        steered(build(FAMILIES["llama"]), direction(), layer=1, coefficient=coefficient),
    ):
        pass


def test_a_coefficient_that_is_no_number_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="finite"),
        steered(build(FAMILIES["llama"]), direction(), layer=1, coefficient=float("nan")),
    ):
        pass


def test_a_model_without_its_head_is_refused() -> None:
    model = LlamaModel(build(FAMILIES["llama"]).config).eval()
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"), ablated(model, direction()):
        pass


def test_a_model_with_an_encoder_is_refused() -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="has an encoder"), ablated(model, torch.ones(16)):
        pass


def test_added_directions_for_another_number_of_rows_are_refused() -> None:
    model = build(FAMILIES["llama"])
    with pytest.raises(ValueError, match="2 directions for"), steered(model, direction(rows=2), layer=1):
        model(input_ids=torch.ones(3, 4, dtype=torch.long))


def test_what_is_no_model_of_transformers_is_refused() -> None:
    model = build(FAMILIES["llama"])
    with (
        pytest.raises(TypeError, match="not a DataParallel. Give the model inside of it"),
        ablated(
            nn.DataParallel(model),  # type: ignore[arg-type]
            torch.ones(D_MODEL),
        ),
    ):
        pass


@pytest.mark.parametrize("name", ["gpt_neox", "falcon", "granite", "phi"])
def test_autocast_does_not_hide_where_a_stream_is_written(name: str) -> None:
    """Rounded to half precision a layer's output is no sum of its parts."""
    model, r, ids = build(FAMILIES[name]), torch.randn(D_MODEL), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(ids, use_cache=False).logits
        with ablated(model, r):
            assert not torch.allclose(model(ids, use_cache=False).logits, plain, atol=0.1)


def test_a_second_thread_is_refused_while_the_first_has_a_context_open() -> None:
    model, r = build(FAMILIES["llama"]), direction()
    plain = logits(model)

    def elsewhere() -> Tensor:
        with ablated(model, direction(1)):
            return logits(model)

    with ThreadPoolExecutor(1) as thread:
        with steered(model, r, layer=1):
            expected = logits(model)
            with pytest.raises(ValueError, match="Another thread runs this model"):
                thread.submit(elsewhere).result()
            with ablated(model, direction(2)):  # this thread may
                pass
            assert torch.equal(logits(model), expected)
        assert not torch.equal(thread.submit(elsewhere).result(), plain)  # control
    assert torch.equal(logits(model), plain)
