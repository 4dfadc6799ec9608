"""Which documents media, captions, rows and texts become."""

import datetime
import decimal
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_ext.config import InputError
from megatron_ext.data.drafts import caption_drafts
from megatron_ext.data.draws import choose
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.templates import fill
from megatron_ext.vocab import Image
from tests.unit.data.samples import CODEBOOK_SIZE, write_tokenized_folder
from tests.unit.data.test_programs import arguments, decoded
from tools import preprocess_data

PICTURE = Image(np.arange(6).reshape(2, 3))


def config(**options) -> PreprocessConfig:
    return PreprocessConfig(output_prefix="out", vision=("codes",), **options)


def shape(parts: tuple) -> str:
    return "".join(part if isinstance(part, str) else "#" for part in parts)


def of_captions(captions: list[str], count: int = 2000, **options) -> list[list[str]]:
    """The documents of `count` pictures with these captions."""
    given = config(**options)
    return [[shape(d.parts) for d in caption_drafts(f"key{n}", PICTURE, captions, given)] for n in range(count)]


def share(documents: list[list[str]], text: str) -> float:
    flat = [document for each in documents for document in each]
    return flat.count(text) / len(flat)


def test_captions_stand_before_after_or_are_left_out():
    before = of_captions(["cat"], caption_position="before", empty_caption_probability=0.1)
    assert share(before, "cat#") + share(before, "#") == 1
    assert abs(share(before, "#") - 0.1) < 0.03  # standard deviation 0.007
    mixed = of_captions(["cat"], caption_after_probability=0.3, empty_caption_probability=0.5)
    assert abs(share(mixed, "#cat") - 0.3) < 0.05 and abs(share(mixed, "#") - 0.35) < 0.05  # 0.01 each
    assert set(map(tuple, of_captions(["cat"], caption_position="both"))) == {("cat#", "#cat")}
    assert share(of_captions(["cat"], caption_position="after", empty_caption_probability=1.0), "#cat") == 1


def test_captions_are_chosen_by_key_and_seed_alone():
    captions = ["a", "b", "c"]
    one = of_captions(captions, captions_per_sample=1, caption_position="before")
    assert all(len(each) == 1 for each in one)
    assert all(abs(share(one, f"{caption}#") - 1 / 3) < 0.05 for caption in captions)  # standard deviation 0.01
    assert one == of_captions(captions, captions_per_sample=1, caption_position="before")
    assert one != of_captions(captions, captions_per_sample=1, caption_position="before", seed=1)
    assert all(len(set(each)) == 2 for each in of_captions(captions, captions_per_sample=2, caption_position="before"))
    assert of_captions(captions, 1, captions_per_sample=5, caption_position="before") == [["a#", "b#", "c#"]]
    assert choose(2, range(9), "x") == sorted(choose(2, range(9), "x"))


def test_a_picture_follows_its_caption_on_disk(rows):
    media = {f"q{n}": (np.full((1, 2), n), [f"number {n}"]) for n in range(4)}
    folder = str(write_tokenized_folder(rows / "captioned", media))
    preprocess_data.main(arguments(rows, vision=[folder], text=[], caption_position="before"))
    found = {key: parts for key, parts in decoded(rows / "out/set_train")}
    assert found == {f"q{n}": (f"number {n}", Image(np.full((1, 2), n))) for n in range(4)}


def test_templates():
    templates = ("{caption}{media}", "Draw: {caption} {media}")
    found = of_captions(["a {media} in braces"], caption_position="before", before_templates=templates)
    assert {document for each in found for document in each} == {"a {media} in braces#", "Draw: a {media} in braces #"}
    assert fill("{a}-{b}-{a}", a="", b=[PICTURE, "x", "", "y"]) == ("-", PICTURE, "xy-")
    for wrong in ("{caption}", "{caption}{media}{media}", "{caption}{media}{more}"):
        with pytest.raises(InputError, match="before_templates is .*must hold {caption} and {media}"):
            config(before_templates=(wrong,))
    with pytest.raises(InputError, match="after_templates is empty"):
        config(after_templates=())


@pytest.fixture
def rows(tmp_path, text_model) -> Path:
    rng = np.random.default_rng(0)
    media = {f"p{n}": (rng.integers(0, CODEBOOK_SIZE, (2, 3)), []) for n in range(6)}
    media["clip"] = (rng.integers(0, CODEBOOK_SIZE, (3, 2, 3)), [])
    write_tokenized_folder(tmp_path / "codes", media)
    (tmp_path / "text.model").write_bytes(text_model)
    return tmp_path


def documents(folder: Path, content: list, name: str = "rows.jsonl", **options) -> dict[str, str]:
    """Key (of rows without one the number) -> the document's shape."""
    text = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in content)
    opened = gzip.open if name.endswith(".gz") else open
    with opened(folder / name, "wt", errors="surrogateescape") as file:
        file.write(text)
    given = {"vision": [], "text": [], "rows": [str(folder / name)], "row_media": [str(folder / "codes")], **options}
    preprocess_data.main(arguments(folder, **given))
    return {key.rpartition("#")[2]: shape(parts) for key, parts in decoded(folder / "out/set_train")}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_interleaved_rows(rows, name):
    content = [
        {"key": "story", "content": ["one ", {"text": "cat"}, {"image": "p1"}, {"image": "p0"}, "", "end"]},
        {"content": [{"video": "clip"}, "a clip"]},
        {"content": ["only text"]},
    ]
    assert documents(rows, content, name) == {"story": "one cat##end", "2": "#a clip", "3": "only text"}


def test_rows_of_questions_and_answers(rows):
    turns = [{"question": "who", "answer": "a cat"}, {"question": "and", "answer": "a dog"}]
    content = [
        {"key": "one", "media": "p1", "question": "what?", "answer": "a cat"},
        {"key": "talk", "media": ["p1", "clip"], "turns": turns},
        {"key": "plain", "question": "what", "answer": "that"},
    ]
    start = "You are a helpful assistant. USER: "
    assert documents(rows, content) == {
        "one": start + "#what?. ASSISTANT: a cat",
        "talk": start + "##who. ASSISTANT: a cat USER: and. ASSISTANT: a dog",
        "plain": start + "what. ASSISTANT: that",
    }
    own = {
        "understanding_templates": ["{media}{question}{answer}"],
        "output_prefix": rows / "out/set",
        "overwrite": True,
    }
    assert documents(rows, content, **own)["one"] == "#what?a cat"


def test_rows_of_parquet(rows):
    content = [[{"text": "see", "image": None}, {"text": None, "image": "p3"}], [{"text": "more", "image": None}]]
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a", None], "content": content}), rows / "rows.parquet")
    given = {"vision": [], "text": [], "rows": [str(rows / "rows.parquet")], "row_media": [str(rows / "codes")]}
    preprocess_data.main(arguments(rows, **given))
    found = [(key.rpartition("/")[2], shape(parts)) for key, parts in decoded(rows / "out/set_train")]
    assert found == [("a", "see#"), ("rows.parquet#2", "more")]


def test_other_columns_of_parquet_are_not_read_and_wrong_ones_are_bad_rows(rows, capsys):
    """JSON has no word for times, bytes and decimals; a column of pictures should not cost its reading."""
    columns = {
        "key": [1, 2],
        "question": ["what", "who"],
        "answer": ["that", "he"],
        "media": pyarrow.array([None, b"\xff"], pyarrow.binary()),
        "when": [datetime.datetime(2024, 1, 1)] * 2,
        "price": [decimal.Decimal("1.50")] * 2,
        "jpg": [b"\xff\xd8"] * 2,
    }
    path = rows / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    damaged = bytearray(path.read_bytes())
    pictures = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(len(columns) - 1)
    start = pictures.dictionary_page_offset
    damaged[start : start + pictures.total_compressed_size] = b"x" * pictures.total_compressed_size
    path.write_bytes(damaged)
    given = {"vision": [], "text": [], "rows": [str(path)], "max_bad_fraction": 0.5}
    preprocess_data.main(arguments(rows, **given))
    assert [key for key, _ in decoded(rows / "out/set_train")] == ["1"]
    assert "2: it has neither content, nor question and answer as strings" in capsys.readouterr().out
    pyarrow.parquet.write_table(pyarrow.table({"jpg": [b"x"]}), path)
    with pytest.raises(InputError, match=r"no column 'key' or 'content' or .*; it has jpg \(binary\)"):
        preprocess_data.main(arguments(rows, **given))


def test_bad_rows_are_skipped_by_name(rows, capsys):
    content = [
        {"key": "fine", "content": ["x"]},
        {"key": "lost", "content": ["x", {"image": "nobody"}]},
        {"key": "kind", "content": [{"video": "p1"}]},
        {"key": "odd", "content": [{"audio": "p1"}]},
        {"key": "blank", "content": [" "]},
        {"key": "half", "question": "x"},
        {"key": "turns", "turns": 5},
        {"key": "fine", "content": ["again"]},
        "[]",
        "{",
        '{"content": ["half \\ud83d"]}',
        '{"content": ["bad \udcff"]}',
        '{"content": ' + "[" * 700 + "]" * 700 + "}",  # Python parses it, and fails to send it to a worker
        "[" * 20_000 + "]" * 20_000,
    ]
    assert documents(rows, content, max_bad_fraction=1, workers=2) == {"fine": "x"}
    printed = capsys.readouterr().out
    skipped = [line.removeprefix("skipped ") for line in printed.splitlines() if line.startswith("skipped ")]
    unicode = "not UTF-8: it has a broken byte or a lone surrogate"
    assert skipped == [
        f"{rows}/rows.jsonl: lost: no sample 'nobody' in row_media",
        f"{rows}/rows.jsonl: kind: 'p1' is no clip",
        f"{rows}/rows.jsonl: odd: content 0 is neither a text nor one of text, image and video with a string",
        f"{rows}/rows.jsonl: blank: it is empty",
        f"{rows}/rows.jsonl: half: it has neither content, nor question and answer as strings, nor turns of these",
        f"{rows}/rows.jsonl: turns: turns is no list",
        f"{rows}/rows.jsonl: fine (sample 8): its key has come before",
        f"{rows}/rows.jsonl:9: no JSON object",
        f"{rows}/rows.jsonl:10: no JSON object",
        f"{rows}/rows.jsonl:11: {unicode}",
        f"{rows}/rows.jsonl:12: {unicode}",
        f"{rows}/rows.jsonl:13: no JSON object",
        f"{rows}/rows.jsonl:14: no JSON object",
    ]


def test_media_of_one_key_in_two_folders_are_refused(rows):
    write_tokenized_folder(rows / "more", {"p1": (np.ones((1, 1), int), [])})
    both = [str(rows / "codes"), str(rows / "more")]
    with pytest.raises(InputError, match="row_media has two samples of key 'p1'"):
        documents(rows, [{"content": ["x"]}], row_media=both)


def test_near_duplicates_fall_on_one_side(rows, tmp_path):
    """Texts equal but for case and punctuation; pictures whose perceptual hashes differ in two bits; rows follow."""
    rng = np.random.default_rng(3)
    words = np.array("a cat sits on the mat two dogs and birds".split())
    texts = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    for name, variant in (("1.txt", str), ("2.txt", lambda text: text.upper().replace(" ", ", ") + "!")):
        (rows / name).write_text("\n".join(map(variant, texts)))
    media = {f"{side}{n}": (np.full((1, 1), n % 50), [f"{side} {n}"]) for n in range(60) for side in "ab"}
    write_tokenized_folder(rows / "twins", media)
    hashes = rng.integers(0, 1 << 62, 60)
    table = {
        "key": list(media),
        "phash": [int(hashes[n]) ^ (5 if side == "b" else 0) for n in range(60) for side in "ab"],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), rows / "curated.parquet")
    (rows / "rows.jsonl").write_text(
        "\n".join(json.dumps({"key": f"r{n}", "media": f"b{n}", "question": "?", "answer": "!"}) for n in range(60))
    )
    given = {
        "vision": [str(rows / "twins")], "text": [str(rows / "?.txt")], "rows": [str(rows / "rows.jsonl")],
        "row_media": [str(rows / "twins")], "duplicates": [str(rows / "*.parquet")], "valid_fraction": 0.4,
        "text_unit": "line",
    }  # fmt: skip
    preprocess_data.main(arguments(rows, **given))
    sides = {
        key.rpartition("/")[2]: split for split in ("train", "valid") for key, _ in decoded(rows / f"out/set_{split}")
    }
    assert len(sides) == 60 * 2 + 60 * 2 + 60 and set(sides.values()) == {"train", "valid"}
    for n in range(60):
        assert sides[f"1.txt#{n + 1}"] == sides[f"2.txt#{n + 1}"]
        assert sides[f"a{n}"] == sides[f"b{n}"] == sides[f"r{n}"]
