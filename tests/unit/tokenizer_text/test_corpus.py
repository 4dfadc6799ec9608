"""The corpus of a text tokenizer: a bounded sample that depends on its texts alone."""

import json
import tarfile
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from rich.console import Console

from megatron_ext.config import BadSamples, InputError
from tokenizer_train.text.corpus import MAX_LINE, CorpusFiles, LineSample, sample_corpus
from tokenizer_train.text.measure import language_of

QUIET = Console(quiet=True)


def _documents(*patterns: str, captions: tuple[str, ...] = (), bad: BadSamples | None = None) -> list[str]:
    return list(CorpusFiles.find(patterns, captions).documents("text", bad or BadSamples(0), QUIET))


@pytest.mark.parametrize("seed", range(20))
def test_a_sample_is_a_function_of_the_lines(seed: int) -> None:
    """The lines of the smallest hashes, as many as fit: what a sort of everything gives, in any order of reading."""
    random = Random(seed)
    lines = ["".join(random.choices("ab一", k=random.randrange(12))) for _ in range(60)]
    limit = random.randrange(300)
    everything = LineSample(10**9, b"key")
    for line in lines:
        everything.add(line)
    expected, size = [], 0
    for line in everything.lines():
        size += len(line.encode())
        if size > limit:
            break
        expected.append(line)
    random.shuffle(lines)
    sample = LineSample(limit, b"key")
    for line in lines:
        sample.add(line)
    assert sample.bytes == sum(len(line.encode()) for line in expected)
    assert list(sample.lines()) == expected


def test_what_is_held_out_depends_on_the_text_alone() -> None:
    documents = [f"document {number}\nof two lines, {number}" for number in range(2000)]

    def split(documents: list[str], seed: int) -> tuple[set[str], set[str]]:
        corpus = sample_corpus(documents, seed=seed, held_out_fraction=0.25, sample_bytes=10**6, held_out_bytes=10**6)
        assert corpus.documents == len(documents) and not corpus.is_sampled
        return set(corpus.lines), set(corpus.held_out)

    train, held_out = split(documents, 1)
    assert split([*reversed(documents), *documents[:7]], 2) == (train, held_out)
    assert not train & held_out and len(train | held_out) == 4000
    assert 0.21 < len(held_out) / 4000 < 0.29  # 0.25 +- 4 deviations of 2,000 draws
    assert all((f"document {number}" in train) == (f"of two lines, {number}" in train) for number in range(2000))


def test_a_large_corpus_is_drawn_from() -> None:
    lines = [f"line {number:05d} of fixed length" for number in range(5000)]

    def drawn(seed: int) -> tuple[str, ...]:
        corpus = sample_corpus(lines, seed=seed, held_out_fraction=0.1, sample_bytes=26_000, held_out_bytes=2600)
        assert corpus.is_sampled and len(corpus.lines) == 1000 and len(corpus.held_out) == 100
        return corpus.lines

    assert drawn(1) == drawn(1) != drawn(2)
    # Evenly from everywhere: 1,000 of 5,000, mean 2,500 +- 4 * 5000 / sqrt(12 * 1000).
    assert 2318 < sum(int(line[5:10]) for line in drawn(1)) / 1000 < 2682


def test_long_lines_are_cut_and_blank_ones_dropped() -> None:
    corpus = sample_corpus(
        ["x" * (2 * MAX_LINE + 1), " \n\t\n", "a\r\nb"],
        seed=0, held_out_fraction=0, sample_bytes=10**6, held_out_bytes=1,
    )  # fmt: skip
    assert sorted(map(len, corpus.lines)) == [1, 1, 1, MAX_LINE, MAX_LINE]


def test_captions_of_folders_and_tars(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a cat\n")
    (folder / "a.json").write_text(json.dumps({"caption": "a cat", "caption_zh": "一只猫", "caption_length": 8}))
    (folder / "b.json").write_text("{")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, f"tar/{file.name}")
    (folder / "c.png").symlink_to("gone.png")
    bad = BadSamples(1)
    found = _documents(captions=(str(folder), f"{tmp_path}/*.tar"), bad=bad)
    assert found == ["a cat", "一只猫"] * 2
    assert [source for source, _ in bad.samples] == [
        f"{folder}/b.png",
        f"{folder}/c.png",  # what cannot be used is skipped and named, here as in all programs
        f"{tmp_path}/shard.tar:tar/b.png",
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "input .*none.txt' is missing"),
        ("broken.txt.gz", b"no", "cannot read text .*broken.txt.gz: Not a gzipped file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        _documents(str(tmp_path / name))


@pytest.mark.parametrize(
    "line, language",
    [
        ("A cat.", "english"),
        ("一只猫 cat", "other"),
        ("一只猫坐 cat", "chinese"),
        ("Ein Kätzchen", "english"),
        ("кошка", "other"),
        ("1234", "other"),
    ],
)
def test_language(line: str, language: str) -> None:
    assert language_of(line) == language
