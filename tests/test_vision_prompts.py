"""Image-and-question prompts: real loading code on local data of the same schema, and images of every kind."""

import io
import json
import logging
import struct
import zlib
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pytest
from PIL import Image

from refusal_direction.errors import DownloadError, PromptFileError, TooFewPromptsError
from refusal_direction.prompts import Kind, Prompt, Split
from refusal_direction.prompts import pairs as vision
from refusal_direction.prompts.images import UnusableImageError, usable
from refusal_direction.prompts.sampling import SampleSizes, sample_pairs


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(
    colour: str = "red", size: tuple[int, int] = (8, 6), form: str = "PNG", mode: str = "RGB", **options
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form, **options)
    return buffer.getvalue()


def parquet(path: Path, images: list[bytes], **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {**columns, "image": [{"bytes": image, "path": None} for image in images]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)


def benchmark(folder: Path, categories: dict[str, list[bytes]]) -> str:
    """A repository laid out as MM-SafetyBench is: a configuration for each category, with a split SD."""
    lines = ["---", "configs:"]
    for category, images in categories.items():
        questions = [f"{category} question {index}" for index in range(len(images))]
        ids = [str(index) for index in range(len(images))]
        parquet(folder / f"data/{category}/SD.parquet", images, id=ids, question=questions)
        lines += [f"- config_name: {category}", "  data_files:", "  - split: SD"]
        lines += [f"    path: data/{category}/SD.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def test_every_category_gives_at_most_fifty_pairs_in_order(tmp_path: Path):
    source = benchmark(
        tmp_path / "mm", {name: [picture()] * 53 if name == "Fraud" else [picture()] * 2 for name in vision.CATEGORIES}
    )
    pairs = vision.harmful_pairs(source)
    assert len(pairs) == 12 * 2 + 50
    assert (pairs[0].id, pairs[0].text) == ("Illegal_Activitiy/0", "Illegal_Activitiy question 0")
    assert pairs[0].image is not None
    assert pairs[0].image.mode == "RGB"


def test_both_spellings_of_the_misspelt_category_are_accepted(tmp_path: Path):
    names = ["Illegal_Activity" if name == "Illegal_Activitiy" else name for name in vision.CATEGORIES]
    pairs = vision.harmful_pairs(benchmark(tmp_path / "mm", {name: [picture()] for name in names}))
    assert len(pairs) == len(vision.CATEGORIES)


def test_a_category_that_is_missing_is_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    names = [name for name in vision.CATEGORIES if name != "Sex"]
    pairs = vision.harmful_pairs(benchmark(tmp_path / "mm", {name: [picture()] for name in names}))
    assert len(pairs) == 12
    assert [record.getMessage().split()[0] for record in caplog.records] == ["Sex"]


def test_without_a_network_one_category_is_tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    tried = []

    def out_of_reach(source: str, category: str, **others: object) -> None:
        tried.append(category)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(vision.datasets, "load_dataset", out_of_reach)
    with pytest.raises(DownloadError, match="could not be loaded .no route to host.. Check the network"):
        vision.harmful_pairs()
    assert set(tried) <= {"Illegal_Activitiy", "Illegal_Activity"}
    assert not caplog.records


def test_no_category_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(DownloadError, match="No category of .* could be loaded"):
        vision.harmful_pairs(str(tmp_path / "nowhere"))


def test_harmless_images_get_one_of_five_questions_drawn_with_the_seed(tmp_path: Path):
    parquet(tmp_path / "coco/data/train-0.parquet", [picture()] * 20, image_id=list(range(20)))
    first, again = (vision.harmless_pairs(str(tmp_path / "coco")) for _ in range(2))
    assert [pair.text for pair in first] == [pair.text for pair in again]
    assert len({pair.text for pair in first}) > 2
    assert {pair.text for pair in first} <= set(vision.QUESTIONS)


def test_harmless_images_that_cannot_be_loaded_are_an_error(tmp_path: Path):
    with pytest.raises(DownloadError, match="could not be loaded"):
        vision.harmless_pairs(str(tmp_path / "nowhere"))


def test_images_that_cannot_be_shown_are_left_out_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    whole = picture(size=(64, 64), form="JPEG")
    bad = [whole, whole[: len(whole) // 2], b"not an image", picture()]
    pairs = vision.harmful_pairs(benchmark(tmp_path / "mm", dict.fromkeys(vision.CATEGORIES[:2], bad)))
    assert [pair.id for pair in pairs[:2]] == ["Illegal_Activitiy/0", "Illegal_Activitiy/3"]
    assert any(
        "2 of the images of Illegal_Activitiy cannot be read" in record.getMessage() for record in caplog.records
    )


def test_rows_without_an_image_are_left_out_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/train.jsonl").write_text('{"image_id": 1}\n{"image_id": 2}\n')
    assert vision.harmless_pairs(str(tmp_path / "coco")) == []
    assert [record.getMessage() for record in caplog.records] == [
        "2 of the images of coco cannot be read and are left out (0: missing)."
    ]


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (picture(mode="CMYK", colour=(0, 255, 255, 0), form="JPEG"), (8, 6)),
        (picture(mode="L", colour=200), (8, 6)),
        (picture(mode="P", colour=3), (8, 6)),
        (picture(mode="I;16", colour=3), (8, 6)),
        (picture(size=(10_000, 500)), (2048, 102)),
    ],
    ids=["CMYK", "grey", "palette", "16 bit", "10,000 pixels wide"],
)
def test_any_kind_of_image_becomes_rgb_of_reasonable_size(content: bytes, size: tuple[int, int]):
    shown = usable(opened(content))
    assert (shown.mode, shown.size) == ("RGB", size)


@pytest.mark.parametrize(
    ("form", "most"),
    [("uint16", 65535), ("int32", 255), ("int32", 65535), ("int32", 100_000), ("float32", 1.0), ("float32", 255.0)],
)
def test_grey_values_of_more_than_a_byte_are_scaled_and_not_cut_off(form: str, most: float):
    ramp = (np.linspace(0, most, 256)[None].repeat(4, 0)).astype(form)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "TIFF")
    shown = np.asarray(usable(opened(buffer.getvalue())))[0, :, 0].astype(int)
    assert abs(shown - np.arange(256)).max() <= 1


@pytest.mark.parametrize(("mode", "white"), [("I", 255), ("I", 65535), ("F", 1.0)])
def test_an_image_of_one_grey_keeps_it(mode: str, white: float):
    assert usable(Image.new(mode, (8, 8), white)).getpixel((0, 0)) == (255, 255, 255)
    assert usable(Image.new(mode, (8, 8), 0)).getpixel((0, 0)) == (0, 0, 0)


def damaged(length: int) -> bytes:
    """A PNG whose first chunk says that it is so long, with a right checksum."""
    chunk = b"IHDR" + picture()[16:29][:length]
    return picture()[:8] + struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk)) + picture()[33:]


def test_a_file_that_pillow_stumbles_over_is_left_out_with_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    pairs = vision.harmful_pairs(benchmark(tmp_path / "mm", {vision.CATEGORIES[0]: [damaged(13), damaged(5)]}))
    assert [pair.id for pair in pairs] == ["Illegal_Activitiy/0"]  # control: it would be an image
    assert "1 of the images of Illegal_Activitiy cannot be read" in caplog.text


def test_an_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    assert usable(opened(picture(form="JPEG", exif=exif.tobytes()))).size == (6, 8)


def test_the_first_frame_of_an_animation_is_shown():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    image = opened(buffer.getvalue())
    image.seek(1)
    assert usable(image).getpixel((0, 0)) == (255, 0, 0)


def test_transparency_is_shown_on_white():
    assert usable(opened(picture(mode="RGBA", colour=(0, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)


def test_an_empty_image_cannot_be_shown():
    with pytest.raises(UnusableImageError, match="no pixels"):
        usable(Image.new("RGB", (0, 5)))


def own(folder: Path, lines: list[object]) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return folder


def test_a_folder_of_ones_own_is_read_in_order(tmp_path: Path):
    folder = own(
        tmp_path / "own", [{"file_name": "a.png", "question": "Why?"}, {"file_name": "a.png", "question": " What?\n"}]
    )
    assert [(pair.id, pair.text) for pair in vision.read_folder(folder)] == [("own/0", "Why?"), ("own/1", "What?")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a.png"', "line 1 is not valid JSON"),
        ({"file_name": "a.png"}, "line 1 lacks"),
        (
            {"file_name": "b.png", "question": "Why?"},
            "line 1 names 'b.png', which cannot be read.*Put the image beside",
        ),
        ({"file_name": "b" * 5000, "question": "Why?"}, "line 1 names 'bbb.*which cannot be read"),
        ({"file_name": "a\0.png", "question": "Why?"}, "line 1 names .*which cannot be read"),
        ({"file_name": "a.png", "question": " "}, "the question in line 1 is empty"),
        (r'{"file_name": "a.png", "question": "\ud800"}', "the question in line 1 is empty, or not text"),
        ("", "holds no pairs"),
    ],
)
def test_a_malformed_folder_is_named_with_its_line(tmp_path: Path, line: object, said: str):
    with pytest.raises(PromptFileError, match=said):
        vision.read_folder(own(tmp_path / "own", [line]))


def test_metadata_that_are_not_utf_8_are_named(tmp_path: Path):
    folder = own(tmp_path / "own", [])
    (folder / "metadata.jsonl").write_bytes('{"file_name": "a.png", "question": "Où ?"}'.encode("latin-1"))
    with pytest.raises(PromptFileError, match=r"metadata\.jsonl: cannot be read as UTF-8"):
        vision.read_folder(folder)


def test_a_pair_that_is_there_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """So that it cannot be drawn for the direction and for its scores."""
    folder = own(tmp_path / "own", [{"file_name": name, "question": "Why?"} for name in ("a.png", "b.png", "a.png")])
    (folder / "b.png").write_bytes(picture())
    pairs = vision.read_folder(folder)
    sizes = SampleSizes(n_train=1, n_val=1)
    with pytest.raises(TooFewPromptsError, match=r"There are 1 harmful pairs \(of 3; the others are equal to one"):
        sample_pairs(pairs, two_pools()[1], sizes)
    assert "2 of 3 harmful prompts repeat others. Each counts once, which leaves 1." in caplog.text
    (folder / "b.png").write_bytes(picture("blue"))
    assert len(sample_pairs(vision.read_folder(folder), two_pools()[1], sizes).harmful_val) == 1


def test_a_folder_without_metadata_is_explained(tmp_path: Path):
    with pytest.raises(PromptFileError, match=r"there is no metadata\.jsonl"):
        vision.read_folder(tmp_path)


def two_pools(count: int = 10) -> tuple[list[Prompt], list[Prompt]]:
    bad, good = ([Prompt(f"{kind}/{i}", f"{kind} {i}") for i in range(count)] for kind in ("bad", "good"))
    return bad, good


@pytest.mark.parametrize("n_test", [0, 3, 100])
def test_pools_are_shuffled_with_one_generator_and_split_from_the_head(n_test: int):
    """The test split comes after the others, so that its size moves none of them."""
    sets = sample_pairs(*two_pools(), SampleSizes(n_train=4, n_val=2, n_test=n_test, seed=42))
    rng = Random(42)
    expected = two_pools()
    for kind, pool in zip(Kind, expected, strict=True):
        rng.shuffle(pool)
        assert [*sets[kind, Split.TRAIN], *sets[kind, Split.VALIDATION]] == pool[:6]
        assert [*sets[kind, Split.TEST]] == pool[6 : 6 + n_test]


def test_a_test_pool_of_its_own_moves_no_draw():
    held_out = {kind: [Prompt(f"{kind.value}_test/{i}", f"{kind.value} test {i}") for i in range(5)] for kind in Kind}
    sizes = SampleSizes(n_train=4, n_val=2, n_test=3, seed=42)
    sets = sample_pairs(*two_pools(), sizes, test=held_out)
    assert sets.for_selection == sample_pairs(*two_pools(), sizes).for_selection
    for kind in Kind:
        assert len(set(sets[kind, Split.TEST]) & set(held_out[kind])) == 3


def test_too_few_pairs_are_an_error():
    with pytest.raises(TooFewPromptsError, match=r"There are 1 harmful pairs, but 4 \+ 2 were asked for"):
        sample_pairs([Prompt("a", "b")], [], SampleSizes(n_train=4, n_val=2, seed=42))


def test_warnings_are_of_the_package(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING), pytest.raises(DownloadError):
        vision.harmful_pairs("/nowhere")
    assert {record.name for record in caplog.records} == {"refusal_direction.prompts.pairs"}
