"""Prompt files as they are found in the world: two columns, repeated names, other formats and encodings, pipes."""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusal_direction.errors import PromptError, PromptFileError, TooFewPromptsError
from refusal_direction.prompts import Prompt, PromptSets, files, read_prompts
from refusal_direction.prompts.columns import PROMPT_COLUMNS
from refusal_direction.prompts.formats import SHAPES
from refusal_direction.prompts.sampling import SampleSizes, sample_pairs, sample_pools

REQUESTS = ["Bake bread", "Paint a wall"]


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the path's suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        cells = [",".join('"' + (cell or "").replace('"', '""') + '"' for cell in line) for line in lines]
        path.write_text("\n".join(cells))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


JOINED = [
    ("instruction", "input", "Translate this.\n\nBonjour"),
    (" Instruction", "INPUT", "Translate this.\n\nBonjour"),
    ("instruction", "context", "Translate this.\n\nBonjour"),
    ("Behavior", "ContextString", "Bonjour\n\n---\n\nTranslate this."),
    ("prompt", "context", "Bonjour\n\n---\n\nTranslate this."),
    ("question", "context", "Bonjour\n\nTranslate this."),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(("first", "second", "joined"), JOINED)
def test_a_request_in_two_columns_is_asked_as_its_authors_ask_it(
    first: str, second: str, joined: str, suffix: str, tmp_path: Path
):
    rows = [{first: "Translate this.", second: more} for more in (" Bonjour\n", "", None, " \n")]
    alone = "Translate this."
    assert texts(written(tmp_path / f"a{suffix}", rows)) == [joined, alone, alone, alone]


def test_rows_that_differ_only_in_the_second_column_are_different_prompts(tmp_path: Path):
    rows = [{"instruction": "Summarise it.", "input": f"Text {index}"} for index in range(90)]
    prompts = read_prompts(written(tmp_path / "a.json", rows))
    assert len({prompt.content for prompt in prompts}) == 90
    drawn = sample_pools(prompts, [Prompt("b", "b"), Prompt("c", "c")] * 20, SampleSizes(1, 1, 200))
    assert len(drawn.harmful_train + drawn.harmful_val + drawn.harmful_test) == 90


@pytest.mark.parametrize("second", [7, ["a"], {"a": 1}, True])
def test_a_second_column_that_is_not_text_is_an_error(second: object, tmp_path: Path):
    path = written(tmp_path / "a.json", [{"instruction": "Translate this.", "input": second}])
    with pytest.raises(PromptFileError, match="entry 0 has a 'input', which belongs to its prompt, that is not text"):
        read_prompts(path)


def test_a_first_column_that_is_empty_is_an_error_whatever_the_second_holds(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", [{"instruction": " ", "input": "Bonjour"}])
    with pytest.raises(PromptFileError, match="line 1 is empty or not text"):
        read_prompts(path)


def test_columns_that_are_not_the_prompts_stay_out(tmp_path: Path):
    row = {"goal": "Bake bread", "target": "Sure", "input": "other", "context": "other"}
    assert texts(written(tmp_path / "a.json", [row])) == ["Bake bread"]


@pytest.mark.parametrize("name", PROMPT_COLUMNS)
def test_every_column_of_prompts_is_known(name: str, tmp_path: Path):
    assert texts(written(tmp_path / "a.csv", [{"id": "1", name.upper(): "Bake bread"}])) == ["Bake bread"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt,n,prompt\na,1,b\n"),
        ("a.csv", "id, Prompt,prompt \n1,a,b\n"),
        ("a.csv", "prompt,id,ID\na,1,2\n"),
        ("a.json", '[{"prompt": "a", "Prompt": "b"}]'),
        ("a.json", '[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]'),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "a", "meta": {"x": 1, "x": 2}}'),
        ("a.jsonl", '{"prompt": "a", "more": [{"y": 1, "y": 1}]}'),
    ],
)
def test_a_name_that_stands_twice_is_an_error(name: str, content: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptFileError, match="has two columns named|has the key '.' twice|has the key 'prompt' twice"):
        read_prompts(tmp_path / name)


def test_columns_without_a_name_may_be_many(tmp_path: Path):
    """Spreadsheets add them."""
    (tmp_path / "a.csv").write_text("instruction,,,\nBake bread,,,\n")
    assert texts(tmp_path / "a.csv") == ["Bake bread"]


def test_a_table_with_a_name_twice_is_an_error(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "Prompt "]), tmp_path / "a.parquet")
    with pytest.raises(PromptFileError, match="the table has two columns named 'prompt'"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", SHAPES)
@pytest.mark.parametrize("spell", [str.upper, str.title])
def test_a_suffix_counts_in_any_case(spell: Any, suffix: str, tmp_path: Path):
    rows = [{"instruction": request} for request in REQUESTS]
    path = tmp_path / f"a{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(REQUESTS))
    else:
        written(path, rows)
    assert texts(path.rename(tmp_path / f"b{spell(suffix)}")) == REQUESTS


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ""])
@pytest.mark.parametrize(
    "content",
    [
        '{"instruction": "Bake bread"}\n{"instruction": "Paint a wall"}\n',
        '\n{"instruction": "Bake bread"}\n\n{"instruction": "Paint a wall"}',
        '[{"instruction": "Bake bread"}, {"instruction": "Paint a wall"}]',
        '[\n  "Bake bread",\n  "Paint a wall"\n]\n',
    ],
    ids=["lines", "lines and gaps", "list", "list of strings"],
)
def test_json_is_a_list_or_lines_whatever_the_suffix(content: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"a{suffix}"
    path.write_text(content)
    assert texts(path) == REQUESTS


def test_json_that_is_neither_is_named_with_its_line(tmp_path: Path):
    for content, said in {
        '{"instruction": "a"}\n{"instruction": "b"\n': "line 2 is not valid JSON",
        '[\n"a",\n"b"\n]\n]': "line 5 is not valid JSON",
    }.items():
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(PromptFileError, match=said):
            read_prompts(tmp_path / "a.json")


FORMS = {
    "text": "Bake bread\nPaint a wall\n",
    "csv": "category,Prompt\nfood,Bake bread\nhome,Paint a wall\n",
    "json": json.dumps(REQUESTS),
    "lines": "\n".join(json.dumps({"goal": request}) for request in REQUESTS),
}


@pytest.mark.skipif(sys.platform == "win32", reason="has no named pipes in folders")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["pipe", "pipe.63"])
def test_a_pipe_is_read_by_its_content(name: str, form: str, tmp_path: Path):
    """As of `--harmful <(...)` in a shell; it can be read only once."""
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=(tmp_path / name).write_text, args=(FORMS[form],))
    writer.start()
    found = texts(tmp_path / name)
    writer.join()
    assert found == REQUESTS


@pytest.mark.parametrize(
    "first", ["Write a poem on my goal, behavior and text", "What is a prompt?", "a, b, prompt me"]
)
def test_a_sentence_with_the_name_of_a_column_is_no_header(first: str, tmp_path: Path):
    (tmp_path / "mine").write_text(f"{first}\nBake bread\n")
    assert texts(tmp_path / "mine") == [first, "Bake bread"]


def test_a_table_without_a_suffix_is_found_by_its_content(tmp_path: Path):
    written(tmp_path / "a.parquet", [{"text": request} for request in REQUESTS]).rename(tmp_path / "a")
    assert texts(tmp_path / "a") == REQUESTS


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("é, Bake bread".encode("utf-16"), "is text in UTF-16 or UTF-32. Save it as UTF-8: iconv"),
        ("Bake bread".encode("utf-16-be"), "holds NUL bytes, so it is text in UTF-16"),
        ("Bake bread".encode("utf-32"), "is text in UTF-16 or UTF-32"),
        (b"PK\x03\x04\x14\x00\xff", "is a zip archive or a spreadsheet"),
        (b"\x1f\x8b\x08\x00\xff", "is compressed. Unpack it"),
        (b"PAR1\x15\xff", "is a Parquet table. Give it a name that ends in .parquet"),
    ],
)
def test_content_that_is_no_utf_8_is_named(content: bytes, said: str, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(PromptFileError, match=said):
        read_prompts(tmp_path / "a.txt")


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".json", ""])
def test_byte_order_marks_and_windows_line_ends_are_no_text(suffix: str, tmp_path: Path):
    content = {".json": '[\r\n"Bake bread",\r\n"Paint a wall"]'}.get(suffix, "prompt\r\nBake bread\r\nPaint a wall\r\n")
    (tmp_path / f"a{suffix}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts(tmp_path / f"a{suffix}") == (["prompt", *REQUESTS] if suffix == ".txt" else REQUESTS)


def test_a_folder_a_device_and_a_file_that_may_not_be_read_are_not_called_badly_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = {tmp_path: "is a folder"}
    if os.path.exists("/dev/null"):
        said[Path("/dev/null")] = "is a device"
    (tmp_path / "secret.txt").write_text("a")
    said[tmp_path / "secret.txt"] = "may not be read .Permission denied.. Change its permissions"
    said[tmp_path / "secret.txt" / "below.txt"] = "no such file"
    said[tmp_path / ("x" * 300)] = "cannot be read .*Check the path"

    def refused(self: Path) -> bytes:
        with open(self / "x" if self.name != "secret.txt" else self, "rb"):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.Path, "read_bytes", refused)
    for path, message in said.items():
        with pytest.raises(PromptFileError, match=message) as caught:
            read_prompts(path)
        assert "UTF-8" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("walledai/AdvBench", True),
        ("JailbreakBench/JBB-Behaviors", True),
        ("nobody/set-1.0", True),
        ("nobody/prompts.json", False),
        ("here/prompts", False),
        ("prompts", False),
        ("a/b/c", False),
        ("/a/b", False),
    ],
)
def test_the_id_of_a_data_set_is_told_from_a_path(
    name: str, is_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(PromptFileError, match="no such file") as caught:
        read_prompts(name)
    assert (f"load_dataset('{name}', split='train').to_json('prompts.jsonl')" in str(caught.value)) == is_one


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_back_from_every_format(requests: list[str]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".json", ".jsonl", ".csv"):
            path = written(Path(folder) / f"a{suffix}", [{"instruction": request} for request in requests])
            assert texts(path) == [request.strip() for request in requests]


# The same prompt twice


def test_repeated_prompts_are_counted_aloud(caplog: pytest.LogCaptureFixture):
    repeated = [Prompt(str(index), f"{index % 31}") for index in range(90)]
    others = [Prompt(f"b{index}", f"b{index}") for index in range(31)]
    drawn = sample_pools(repeated, others, SampleSizes(8, 4, 200))
    assert [record.getMessage() for record in caplog.records] == [
        "59 of 90 harmful prompts repeat others. Each counts once, which leaves 31."
    ]
    assert len(drawn.harmful_test) == 19
    assert {int(prompt.id) for prompt in drawn.harmful_train} <= set(range(31))  # the first of each


def picture(colour: int, size: tuple[int, int] = (4, 4)) -> Any:
    from PIL import Image

    return Image.new("RGB", size, (colour, 0, 0))


def test_pairs_are_the_same_if_both_image_and_question_are(caplog: pytest.LogCaptureFixture):
    same = [Prompt(str(index), "Why?", picture(1)) for index in range(16)]
    others = [Prompt(f"b{index}", "Why?", picture(index + 2)) for index in range(16)]
    with pytest.raises(TooFewPromptsError, match=r"There are 1 harmful pairs \(of 16; the others are equal to one"):
        sample_pairs(same, others, SampleSizes(2, 1))
    with pytest.raises(PromptError, match="1 of the prompts are both harmful and harmless, for example b3"):
        sample_pairs(others, [*others[3:4], Prompt("c", "Why?", picture(99))], SampleSizes(1, 1))
    sample_pairs(others, [Prompt(f"c{index}", "How?", picture(index + 2)) for index in range(16)], SampleSizes(2, 1))


SETS = ("harmful_train", "harmless_train", "harmful_val", "harmless_val", "harmful_test", "harmless_test")


@pytest.mark.parametrize("second", SETS)
@pytest.mark.parametrize("first", SETS)
@pytest.mark.parametrize("images", [False, True])
def test_a_prompt_in_two_sets_from_python_is_an_error(images: bool, first: str, second: str):
    def prompt(text: str, colour: int) -> Prompt:
        return Prompt(text, text, picture(colour) if images else None)

    sets = {name: [prompt(name, index)] for index, name in enumerate(SETS)}
    shared = prompt("shared", 9)
    sets[first].append(shared)
    sets[second].append(Prompt("other id", " shared ", shared.image))
    if first == second:  # twice in one set is a weight
        assert len(PromptSets(**sets)[first_of(first)]) == 3
        return
    with pytest.raises(
        PromptError, match="A prompt is in two sets: '.*' of .* is '.*' of .*. Leave each in one of them"
    ):
        PromptSets(**sets)


def first_of(name: str) -> Any:
    from refusal_direction.prompts.sets import SETS as KEYS
    from refusal_direction.prompts.sets import set_name

    return next(which for which in KEYS if set_name(which) == name)


def test_one_question_about_two_images_is_two_prompts():
    pairs = [[Prompt(str(index), "Why?", picture(index))] for index in range(4)]
    assert len(PromptSets(*pairs).for_selection) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([" \n"], "prompt 0 is empty"),
        (["a", Prompt("b", "")], "prompt 1 is empty"),
        ([Prompt("b", 7)], "prompt 0 has the text 7"),
        ([Prompt(7, "b")], "prompt 0 has the id 7"),
        ([Prompt("b\udcff", "b")], "prompt 0 holds half of a surrogate pair"),
        ([Prompt("b", "b", "b.png")], "prompt 0 has a str for its image. Open it with Pillow"),
        ({"a": 1}, "a dict is not a sequence of prompts. Give a list"),
        ({"a", "b"}, "a set is not a sequence of prompts"),
        (b"a", "97 is neither a string nor a Prompt"),
    ],
)
def test_prompts_that_cannot_be_asked_are_errors(given: Any, said: str):
    with pytest.raises(PromptError, match=f"harmful_val: {said}"):
        PromptSets(["x"], ["y"], given, ["z"])
