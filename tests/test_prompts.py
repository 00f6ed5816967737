"""Prompts: files of every kind, the published splits, and the draws."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest

from refusal_direction.config import Config, PromptSource
from refusal_direction.errors import ConfigurationError, DownloadError, PromptError, PromptFileError, TooFewPromptsError
from refusal_direction.prompts import gather, published, read_prompts
from refusal_direction.prompts.sampling import SampleSizes, sample_pairs, sample_pools, sample_splits
from refusal_direction.prompts.sets import (
    SETS,
    SETS_FOR_SELECTION,
    Kind,
    Prompt,
    PromptSet,
    PromptSets,
    Split,
    set_name,
)

CONTENTS = {
    ".json": '[{"instruction": "Bake bread", "category": null}, {"instruction": "Paint a wall"}]',
    ".jsonl": '{"instruction": "Bake bread"}\n\n{"instruction": "Paint a wall"}\n',
    ".csv": "category,instruction\nfood,Bake bread\nhome,Paint a wall\n",
    ".txt": "Bake bread\n\n  Paint a wall  \n",
}


HARMFUL_TRAIN = (Kind.HARMFUL, Split.TRAIN)


def pool(name: str, count: int) -> list[Prompt]:
    return [Prompt(f"{name}/{index}", f"{name} {index}") for index in range(count)]


def pools(count: int, of: tuple[PromptSet, ...] = SETS) -> dict[PromptSet, list[Prompt]]:
    """A pool for each set, each of another size."""
    return {which: pool(set_name(which), count + index) for index, which in enumerate(of)}


@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_kind_of_file_gives_its_prompts_in_order(tmp_path: Path, suffix: str):
    path = tmp_path / f"mine{suffix}"
    path.write_text(CONTENTS[suffix])
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == ["Bake bread", "Paint a wall"]
    assert [prompt.id for prompt in prompts] == ["mine/0", "mine/1"]


@pytest.mark.parametrize("header", ["goal,target", "Behavior,n", " Prompt ,Instructions", "id,TEXT"])
def test_the_names_that_data_sets_have_for_a_prompt_are_known(header: str, tmp_path: Path):
    row = {
        name: "Bake bread" if name.strip().lower() in ("goal", "behavior", "prompt", "text") else "x"
        for name in header.split(",")
    }
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join(row.values())}\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    for name in ("a.csv", "a.json"):
        assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["Bake bread"]


def test_other_names_are_said(tmp_path: Path):
    (tmp_path / "a.csv").write_text("id;prompt\n1;Bake bread\n")
    with pytest.raises(
        PromptFileError, match="has no 'instruction' .nor prompt, .*, but 'id;prompt'. Expected cells with commas"
    ):
        read_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_white_space_around_a_prompt_does_not_count(name: str, tmp_path: Path):
    """A tokenizer might join it with what the template puts there, and the same prompt would count twice."""
    content = {
        "a.json": '["\\n Bake bread\\n"]',
        "a.jsonl": '{"text": " Bake bread "}',
        "a.csv": 'text\n" Bake bread\n"\n',
    }
    (tmp_path / name).write_text(content[name])
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["Bake bread"]


def test_a_json_list_of_strings_is_a_list_of_prompts(tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text('["Bake bread"]')
    assert read_prompts(path)[0].text == read_prompts(str(path))[0].text == "Bake bread"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "", "holds no prompts"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", '{"data": [{"instruction": "x"}]}', "line 1 has no 'instruction' .*, but 'data'. Expected a list"),
        ("a.json", '["x",\n oops]', "line 2 is not valid JSON"),
        ("a.json", '[{"instruction": "x"}, {"text_": "y"}]', "entry 1 has no 'instruction'"),
        ("a.jsonl", '{"instruction": "x"}\n{"instruction"\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"instruction": "x"}\n\n{"category": "y"}\n', "line 3 has no 'instruction'"),
        ("a.jsonl", '{"instruction": 7}\n', "line 1 is empty or not text"),
        ("a.csv", "request\nx\n", "line 2 has no 'instruction'"),
        ("a.csv", "instruction,n\nx,1\n,2\n", "line 3 is empty"),
        ("a.csv", "instruction\nBake bread, and a cake\n", "line 2 has more cells than the header.*in quotes"),
        ("a.csv", 'instruction\n"Bake bread\nPaint a wall\n', "line 2 cannot be read.*Close every quote"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.parquet", "x", "cannot be read as Parquet .*download it again"),
        ("a.xlsx", "x", "prompt files end in .*Rename or convert it"),
        ("a.json", r'["fine", "\ud800 x"]', "entry 1 holds half of a surrogate pair"),
        ("a.jsonl", r'{"instruction": "\udfff"}', "line 1 holds half of a surrogate pair"),
        ("a.json", "[" + "9" * 5000 + "]", "line 1 cannot be read"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, said: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(PromptFileError, match=said) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text_are_said_to_be_so(tmp_path: Path):
    with pytest.raises(PromptFileError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "image.txt").write_bytes(b"one\n\xff\xd8\xff\xe0")
    with pytest.raises(PromptFileError, match="cannot be read as UTF-8 text .line 2: .*Save it as UTF-8"):
        read_prompts(tmp_path / "image.txt")


def test_sets_are_named_by_kind_and_split_in_the_order_of_the_draws():
    """The names stand in files, and the order decides what a seed draws."""
    assert [kind.value for kind in Kind] == ["harmful", "harmless"]
    assert [split.value for split in Split] == ["train", "val", "test"]
    names = ["harmful_train", "harmless_train", "harmful_val", "harmless_val", "harmful_test", "harmless_test"]
    assert [set_name(which) for which in SETS] == names
    assert [set_name(which) for which in SETS_FOR_SELECTION] == names[:4]
    assert list(published.SHA256) == list(SETS)


def test_the_draws_are_those_of_the_published_runs():
    splits, rng = pools(50), Random(42)
    expected = {
        which: rng.sample(splits[which], {Split.TRAIN: 20, Split.VALIDATION: 7, Split.TEST: 9}[which[1]])
        for which in SETS
    }
    drawn = sample_splits(splits, SampleSizes(n_train=20, n_val=7, n_test=9, seed=42))
    for which in SETS:
        assert list(drawn[which]) == expected[which]


@pytest.mark.parametrize("n_test", [0, 9, 1000])
def test_the_test_split_does_not_move_the_draws_from_files(n_test: int):
    sizes = SampleSizes(n_train=20, n_val=7, n_test=n_test, seed=42)
    drawn = sample_splits(pools(50), sizes)
    alone = sample_splits(pools(50, of=SETS_FOR_SELECTION), sizes)
    assert drawn.for_selection == alone.for_selection
    assert [len(drawn[kind, Split.TEST]) for kind in Kind] == [min(n_test, 54), min(n_test, 55)]
    assert not alone.harmful_test + alone.harmless_test


@pytest.mark.parametrize(("n_test", "left"), [(0, (0, 0)), (2, (2, 2)), (1000, (3, 5))])
def test_the_test_split_is_what_is_left_of_one_pool_and_moves_no_draw(n_test: int, left: tuple[int, int]):
    harmful, harmless, rng = pool("harmful", 15), pool("harmless", 17), Random(3)
    expected = [rng.sample(one, 12) for one in (harmful, harmless)]
    drawn = sample_pools(harmful, harmless, SampleSizes(n_train=8, n_val=4, n_test=n_test, seed=3))
    for kind, both in zip(Kind, expected, strict=True):
        assert [*drawn[kind, Split.TRAIN], *drawn[kind, Split.VALIDATION]] == both
        assert not set(drawn[kind, Split.TEST]) & set(both)
    assert tuple(len(set(drawn[kind, Split.TEST])) for kind in Kind) == left


def test_train_and_validation_from_one_pool_do_not_overlap():
    sets = sample_pools(pool("harmful", 12), pool("harmless", 15), SampleSizes(n_train=8, n_val=4, seed=0))
    for kind in Kind:
        train, val = (set(sets[kind, split]) for split in (Split.TRAIN, Split.VALIDATION))
        assert (len(train), len(val), train & val) == (8, 4, set())


def assert_reserves_are_disjoint(sets: PromptSets) -> None:
    texts = [prompt.text for which in SETS for prompt in sets[which]]
    texts += [prompt.text for reserve in sets.reserves.values() for prompt in reserve]
    assert len(texts) == len(set(texts))


def test_reserves_are_the_rest_of_each_splits_own_pool_in_the_order_that_the_seed_draws():
    splits, sizes = pools(50), SampleSizes(n_train=20, n_val=7, n_test=9, seed=42)
    drawn = sample_splits(splits, sizes)
    assert_reserves_are_disjoint(drawn)
    for which in SETS_FOR_SELECTION:
        rest = {*splits[which]} - {*drawn[which]}
        assert set(drawn.reserves[which]) == rest
        assert drawn.reserves[which] != tuple(prompt for prompt in splits[which] if prompt in rest)  # drawn at random
    assert sample_splits(splits, sizes).reserves == drawn.reserves
    assert set(drawn.reserves) == set(SETS_FOR_SELECTION)


def test_a_reserve_has_no_text_of_another_set():
    splits = pools(30)
    test, train = splits[Kind.HARMFUL, Split.TEST], splits[HARMFUL_TRAIN]
    splits[HARMFUL_TRAIN] = [*train, *train[:3], *(Prompt(f"again/{prompt.id}", prompt.text) for prompt in test)]
    drawn = sample_splits(splits, SampleSizes(n_train=2, n_val=7, n_test=len(test), seed=1))
    assert not {prompt.text for prompt in drawn.harmful_test} & {
        prompt.text for prompt in drawn.reserves[HARMFUL_TRAIN]
    }
    texts = [prompt.text for prompt in drawn.reserves[HARMFUL_TRAIN]]
    assert len(texts) == len(set(texts)) == len(train) - 2


@pytest.mark.parametrize("sample", [sample_pools, sample_pairs])
@pytest.mark.parametrize("n_test", [0, 5, 1000])
def test_what_one_pool_has_left_is_reserved_in_the_proportion_of_train_and_validation(
    sample: Callable[..., PromptSets], n_test: int
):
    sizes = SampleSizes(n_train=8, n_val=4, n_test=n_test, seed=3)
    harmful, harmless = pool("harmful", 47), pool("harmless", 30)
    drawn = sample(harmful, harmless, sizes)
    assert_reserves_are_disjoint(drawn)
    for kind, own in ((Kind.HARMFUL, harmful), (Kind.HARMLESS, harmless)):
        left = len(own) - 12 - len(drawn[kind, Split.TEST])
        train, val = (len(drawn.reserves[kind, split]) for split in (Split.TRAIN, Split.VALIDATION))
        assert (train, train + val) == (round(left * 2 / 3), left)


def test_sets_are_extended_from_their_reserves():
    sets = sample_pools(pool("a", 30), pool("b", 30), SampleSizes(n_train=4, n_val=2, n_test=3, seed=0))
    more = sets.reserved({HARMFUL_TRAIN: 3})
    longer = sets.extended({HARMFUL_TRAIN: 3})
    assert longer.harmful_train == (*sets.harmful_train, *more.harmful_train)
    assert more.harmful_train == sets.reserves[HARMFUL_TRAIN][:3]
    assert more.for_selection == more.harmful_train
    assert longer.reserves[HARMFUL_TRAIN] == sets.reserves[HARMFUL_TRAIN][3:]
    assert [longer[which] for which in SETS[1:]] == [sets[which] for which in SETS[1:]]


def test_a_text_that_is_repeated_counts_once():
    repeated = [Prompt(str(index), "same") for index in range(20)]
    with pytest.raises(TooFewPromptsError, match="counted without repetitions, has 1 prompts, but 12 were asked for"):
        sample_pools(repeated, pool("harmless", 20), SampleSizes(n_train=8, n_val=4, seed=0))


def test_places_of_prompts_may_be_strings():
    source = PromptSource(harmful="a.txt", harmless="b.txt", data_dir="data")
    assert (source.harmful, source.harmless, source.data_dir) == (Path("a.txt"), Path("b.txt"), Path("data"))


def test_a_prompt_of_both_kinds_is_an_error():
    with pytest.raises(PromptError, match="2 of the prompts are both harmful and harmless, for example a/0"):
        sample_pools(pool("a", 9), [*pool("b", 9), *pool("a", 2)], SampleSizes(n_train=4, n_val=2, seed=0))


def test_sets_are_made_of_strings_too():
    ours = Prompt("mine", "Bake bread")
    sets = PromptSets(["Pick a lock", "Forge a key"], [ours], ("Hide",), ["Paint"])
    assert sets.for_selection == (
        Prompt("harmful_train/0", "Pick a lock"),
        Prompt("harmful_train/1", "Forge a key"),
        ours,
        Prompt("harmful_val/0", "Hide"),
        Prompt("harmless_val/0", "Paint"),
    )
    with pytest.raises(PromptError, match="harmless_val: 7 is neither a string nor a Prompt"):
        PromptSets([ours], [ours], [ours], [7])


@pytest.mark.parametrize("given", [None, 7, ["\ud800"], [Prompt("a", "half \ud83d")], [3]])
def test_what_is_no_prompts_is_an_error(given: object):
    with pytest.raises(PromptError, match="harmful_val: "):
        PromptSets(["a"], ["b"], given, ["c"])  # type: ignore[arg-type]


def test_too_few_prompts_name_the_set_and_the_flag():
    splits = {which: pool(set_name(which), 5) for which in SETS_FOR_SELECTION}
    with pytest.raises(TooFewPromptsError, match="harmful_val has 5 prompts, but 6 were asked for.*--n_val"):
        sample_splits(splits, SampleSizes(n_train=5, n_val=6, seed=0))


def test_indices_cover_train_and_validation_prompts_in_order():
    sets = sample_pools(pool("harmful", 12), pool("harmless", 12), SampleSizes(n_train=6, n_val=3, n_test=3, seed=0))
    assert tuple(sets.indices()) == SETS_FOR_SELECTION
    for which, indices in sets.indices().items():
        assert tuple(sets.for_selection[index] for index in indices) == sets[which]
    assert [index for indices in sets.indices().values() for index in indices] == list(range(18))


def test_the_digest_is_of_the_texts_of_a_set():
    sets = PromptSets(["Pick a lock", "Hide"], ["Paint"], ["Forge"], ["Bake"])
    expected = hashlib.sha256(b"Pick a lock\0Hide").hexdigest()
    assert sets.digest(HARMFUL_TRAIN) == expected
    assert sets.digest((Kind.HARMLESS, Split.TRAIN)) != expected


def test_one_own_file_alone_is_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="go together"):
        gather(Config(prompts=PromptSource(harmful=tmp_path / "harmful.txt")))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served over HTTP in place of the published repository, holding one verified split."""
    folder = tmp_path / "served"
    folder.mkdir()
    content = json.dumps([{"instruction": f"Request {index}", "category": None} for index in range(3)]).encode()
    (folder / "harmful_train.json").write_bytes(content)
    monkeypatch.setattr(published, "SHA256", {HARMFUL_TRAIN: hashlib.sha256(content).hexdigest()})
    monkeypatch.setattr(published, "SETS", (HARMFUL_TRAIN,))
    monkeypatch.setattr(published, "SETS_FOR_SELECTION", (HARMFUL_TRAIN,))
    monkeypatch.setattr(published, "_PAUSE", 0.0)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(published, "BASE_URL", f"http://127.0.0.1:{httpd.server_port}")
    yield folder
    httpd.shutdown()
    httpd.server_close()


def test_a_split_is_downloaded_once_and_used_offline_after(server: Path, tmp_path: Path):
    data = tmp_path / "data"
    first = published.published_splits(data)
    (server / "harmful_train.json").unlink()
    assert published.published_splits(data) == first
    assert [prompt.text for prompt in first[HARMFUL_TRAIN]] == ["Request 0", "Request 1", "Request 2"]
    assert [path.name for path in data.iterdir()] == ["harmful_train.json"]


def test_a_download_whose_hash_differs_is_refused_and_nothing_is_kept(server: Path, tmp_path: Path):
    (server / "harmful_train.json").write_text("[]")
    with pytest.raises(DownloadError, match="SHA-256 differs"):
        published.published_splits(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_split_that_was_changed_by_hand_is_refused(server: Path, tmp_path: Path):
    data = tmp_path / "data"
    published.published_splits(data)
    (data / "harmful_train.json").write_text("[]")
    with pytest.raises(DownloadError, match="is not the published split"):
        published.published_splits(data)


def test_a_download_that_fails_is_tried_again_then_explained(
    server: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (server / "harmful_train.json").unlink()
    with pytest.raises(DownloadError, match=r"could not be downloaded.*404.*--model_id demo"):
        published.published_splits(tmp_path / "data")
    assert len(caplog.records) == published._TRIES - 1


def test_a_run_goes_on_without_the_test_split_where_it_cannot_be_fetched(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    test = (Kind.HARMFUL, Split.TEST)
    monkeypatch.setattr(published, "SETS", (HARMFUL_TRAIN, test))
    monkeypatch.setitem(published.SHA256, test, "0" * 64)
    assert set(published.published_splits(tmp_path / "data")) == {HARMFUL_TRAIN}
    assert "The run goes on without test prompts (--n_test 0 asks for none)" in caplog.text
    caplog.clear()
    assert set(published.published_splits(tmp_path / "data", test=False)) == {HARMFUL_TRAIN}
    assert not caplog.records


def test_a_data_folder_that_cannot_be_made_is_an_error(server: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="Choose another --data_dir"):
        published.published_splits(tmp_path / "file" / "data")
