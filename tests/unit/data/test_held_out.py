"""No picture, and no near-duplicate of one, stands in both splits; what cannot stand in either is counted and named."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import InputError
from megatron_ext.data import held_out
from megatron_ext.data.drafts import media_keys
from megatron_ext.data.draws import draw, key_hashes
from megatron_ext.data.held_out import HeldOut, Media, References, held_out_keys
from megatron_ext.data.near_duplicates import PictureClusters
from megatron_ext.vocab import Image, Video
from tests.unit.data.samples import write_tokenized_folder
from tests.unit.data.test_programs import arguments, decoded
from tools import merge_datasets, preprocess_data

KEYS = st.integers(0, 9).map("k{}".format)


def oracle(samples: list, table: list, rows: list, fraction: float) -> tuple[set[str], list[set[str]]]:
    """(held-out keys, groups of keys), from the rules in held_out.py, in plain Python."""
    groups: list[tuple[set, set, set]] = []  # keys, contents, clusters
    clusters_of = {key: {cluster for other, cluster in table if other == key} for key, _ in samples}
    for key, content in samples:
        mine = ({key}, {content}, clusters_of[key])
        for other in [group for group in groups if any(a & b for a, b in zip(group, mine, strict=True))]:
            groups.remove(other)
            mine = tuple(a | b for a, b in zip(mine, other, strict=True))
        groups.append(mine)

    def is_drawn(group: tuple[set, set, set]) -> bool:
        first = min(group[0], key=lambda key: key_hashes([key])[0])
        name = f"phash:{min(group[2]):016x}" if group[2] else first
        return draw("valid", name) < fraction

    number_of = {key: number for number, group in enumerate(groups) for key in group[0]}
    drawn = {number for number, group in enumerate(groups) if is_drawn(group)}
    shown = [[number_of[key] for key in row] for row in rows if all(key in number_of for key in row)]
    trained = {number for row in shown if not drawn & set(row) for number in row}
    held = drawn | {number for row in shown if row[0] in drawn and not trained & set(row) for number in row}
    return {key for key, number in number_of.items() if number in held}, [group[0] for group in groups]


@settings(max_examples=80, deadline=None)
@given(
    samples=st.lists(st.tuples(KEYS, st.integers(0, 9)), max_size=12),
    table=st.lists(st.tuples(KEYS, st.integers(0, 2**64 - 1) | st.integers(0, 3)), max_size=8),
    rows=st.lists(st.lists(KEYS, min_size=1, max_size=4), max_size=8),
    fraction=st.sampled_from([0.1, 0.3, 0.6, 0.9]),
)
def test_the_rules(samples, table, rows, fraction):
    media = Media(
        key_hashes([key for key, _ in samples]),
        np.array([content for _, content in samples], np.uint64),
        np.array([draw("valid", key) for key, _ in samples]),
    )
    table = sorted(table, key=lambda row: key_hashes([row[0]])[0])
    clusters = PictureClusters(
        key_hashes([key for key, _ in table]), np.array([cluster for _, cluster in table], np.uint64)
    )
    named = References(key_hashes([key for row in rows for key in row]), np.array([len(row) for row in rows], np.int64))
    found = HeldOut(held_out_keys(media, named, clusters, fraction))
    expected, groups = oracle(samples, table, rows, fraction)
    assert {key for key, _ in samples if key in found} == expected
    assert all(len({key in found for key in group}) == 1 for group in groups)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, text_model) -> Path:
    """Pictures of few codes, so that many keys show the same; clips; tables that join some; rows of up to 4 media."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name in ("captioned", "shown"):
        codes = {f"{name}{n}": rng.integers(0, 50, (1, 2)) // 2 for n in range(120)}
        codes |= {f"both{n}": rng.integers(0, 50, (2, 1)) for n in range(20)}  # one key, two resolutions
        codes |= {f"{name}_clip{n}": rng.integers(0, 8, (2, 1, 1)) for n in range(20)}
        write_tokenized_folder(folder / name, {key: (each, [f"a picture of {key}"]) for key, each in codes.items()})
    keys = [f"{name}{n}" for name in ("captioned", "shown") for n in range(60)]
    hashes = rng.integers(0, 1 << 63, 60, dtype=np.uint64)[rng.integers(0, 60, 120)]
    pyarrow.parquet.write_table(pyarrow.table({"key": keys, "phash": hashes ^ np.uint64(6)}), folder / "hashes.parquet")
    pick = rng.permutation(120).tolist()
    rows = []
    for n in range(60):
        named = [{"image": f"shown{pick.pop()}"} for _ in range(1 + n % 2)]
        named += [{"image": "shown0"}] * (n % 9 == 0) + [{"video": f"shown_clip{n % 20}"}] * (n % 7 == 0)
        rows.append({"key": f"row{n}", "content": ["see", *named]})
        rows.append({"key": f"asked{n}", "media": f"shown{n}", "question": "what?", "answer": "that"})
    rows.append({"key": "lost", "content": [{"image": "shown1"}, {"image": "nowhere"}]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "text.model").write_bytes(text_model)
    return folder


def divided(corpus: Path, output: Path, **options) -> tuple[dict[str, list], dict]:
    """The documents of each split, and the report."""
    given = {
        "vision": [str(corpus / "captioned")], "rows": [str(corpus / "rows.jsonl")],
        "row_media": [str(corpus / "shown")], "text": [], "duplicates": [str(corpus / "hashes.parquet")],
        "valid_fraction": 0.2, "max_bad_fraction": 0.1, "output_prefix": output / "set", **options,
    }  # fmt: skip
    preprocess_data.main(arguments(corpus, **given))
    report = json.loads((output / "set.report.json").read_text())
    return {split: decoded(output / f"set_{split}") for split in ("train", "valid")}, report


def codes_of(part: Image | Video) -> tuple:
    codes = part.codes_HW if isinstance(part, Image) else part.codes_THW
    return codes.shape, codes.astype(np.int64).tobytes()


def test_no_picture_is_in_both_splits(corpus, tmp_path, capsys):
    documents, report = divided(corpus, tmp_path)
    table = pyarrow.parquet.read_table(corpus / "hashes.parquet").to_pydict()
    hash_of = dict(zip(table["key"], table["phash"], strict=True))
    rows = {row["key"]: row for row in map(json.loads, (corpus / "rows.jsonl").read_text().splitlines())}
    marks = {}
    for split, found in documents.items():
        keys = {each for key, _ in found for each in (media_keys(rows[key]) if key in rows else [key])}
        codes = {codes_of(part) for _, parts in found for part in parts if not isinstance(part, str)}
        marks[split] = keys | codes | {hash_of[key] for key in keys & hash_of.keys()}
    assert marks["train"] and marks["valid"] and not marks["train"] & marks["valid"]
    # Nothing else is lost: each sample and row is a document, or dropped by name, or bad.
    dropped = [source.rpartition(": ")[2] for source, _ in report["divided"]]
    assert 0 < len(dropped) < len(rows) / 3
    counts = Counter(key for found in documents.values() for key, _ in found)
    assert {key for key in rows if key not in counts} == {*dropped, "lost"}
    assert len(counts) + len(dropped) + 1 == len(rows) + 160 and set(counts.values()) == {1}
    assert all("is held out" in reason and "is in training" in reason for _, reason in report["divided"])
    several = [key for key, _ in documents["valid"] if key in rows and len(media_keys(rows[key])) > 1]
    assert several  # rows of several pictures are held out, too
    assert f"left out: {len(dropped)} rows with pictures of both sides of the held-out split" in capsys.readouterr().out


def test_shards_and_workers_divide_alike_and_the_work_is_done_once(corpus, tmp_path, monkeypatch):
    whole, report = divided(corpus, tmp_path / "whole")
    shards = tmp_path / "shards"
    with pytest.raises(FileNotFoundError):
        divided(corpus, shards, num_shards=2, shard_index=1, workers=2)
    monkeypatch.setattr(held_out, "_see_tar", None)  # whoever reads all tars again fails
    with pytest.raises(FileNotFoundError):
        divided(corpus, shards, num_shards=2, shard_index=0)
    merge_datasets.main(["--output_prefix", str(shards / "set")])
    assert {split: decoded(shards / f"set_{split}") for split in whole} == whole
    assert json.loads((shards / "set.report.json").read_text()) == report
    with pytest.raises(TypeError):
        divided(corpus, shards, valid_fraction=0.3)


def test_a_split_of_texts_alone_reads_nothing_twice(corpus, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"the text number {n} of many" for n in range(60)))
    divided(
        corpus, tmp_path / "out", vision=[], rows=[], row_media=[], text=[str(tmp_path / "a.txt")], text_unit="line"
    )
    assert not (tmp_path / "out" / held_out.CACHE).exists()


def test_a_shared_picture_costs_few_rows():
    """A picture that a third of the rows show is held out with probability `fraction`, not with nearly all rows."""
    keys = [f"p{n}" for n in range(3000)]
    rows = [[f"p{3 * n}", f"p{3 * n + 1}", "p2" if n % 3 == 0 else f"p{3 * n + 2}"] for n in range(1000)]
    media = Media(key_hashes(keys), key_hashes(keys), np.array([draw("valid", key) for key in keys]))
    named = References(key_hashes([key for row in rows for key in row]), np.full(1000, 3))
    none = PictureClusters(np.empty(0, np.uint64), np.empty(0, np.uint64))
    found = HeldOut(held_out_keys(media, named, none, 0.05))
    sides = [sum(key in found for key in row) for row in rows]
    assert 20 <= sides.count(3) <= 70  # 33 of 667 rows without the shared picture expected, sigma 6
    assert 50 <= 1000 - sides.count(3) - sides.count(0) <= 180  # 97 + 17 expected: 2 x 5 % of rows, a third of 5 %


def test_a_damaged_sample_stops_the_division_by_name(corpus, tmp_path):
    folder = write_tokenized_folder(tmp_path / "codes", {f"p{n}": (np.ones((1, 1), int), ["x"]) for n in range(4)})
    content = (folder / "codes-00001.tar").read_bytes()
    (folder / "codes-00001.tar").write_bytes(content.replace(b'{"key"', b'["key"'))
    with pytest.raises(InputError, match="codes-00001.tar: p2 is damaged .*tokenize again"):
        divided(corpus, tmp_path / "out", vision=[str(folder)], rows=[], row_media=[])
