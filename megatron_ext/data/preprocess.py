"""Preprocessing: inputs to the datasets of a prefix, all of them or those of one shard.

    PREFIX_train.*, PREFIX_valid.*         the datasets (see indexed.py)
    PREFIX.report.json                     what was read, what was left out and why; written last
    PREFIX-00003-of-00010_train.* and so on  the same of a shard

Killed at any moment and started again it ends with the bytes of an undisturbed run: a shard is the unit of work, one
that has its report is not done again.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import BadSamples, InputError
from megatron_ext.data.encoder import TRAIN, VALID, Encoder
from megatron_ext.data.forked import map_forked
from megatron_ext.data.held_out import CACHE, find_held_out
from megatron_ext.data.inputs import Inputs, Unit, deal, read_batches
from megatron_ext.data.manifest import dataset_path, is_whole, publish
from megatron_ext.data.media_index import MediaIndex
from megatron_ext.data.options import PreprocessConfig
from megatron_ext.data.writer import DocumentWriter
from megatron_ext.files import replacing, writing
from megatron_ext.media.array import shard_of_job
from megatron_ext.vocab import Vocabulary

REPORT_VERSION = 2
_REPORT = ".report.json"
_DIVIDED = "rows with pictures of both sides of the held-out split (divided in the report names them)"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one run of preprocessing did."""

    format_version: int = REPORT_VERSION
    recipe: str
    """Digest of inputs and options, the same for all shards."""
    shard: tuple[int, int] | None
    """Index and number of shards; None: everything."""
    documents: dict[str, int]
    """Of each split."""
    samples: int
    """Pictures, clips, rows and texts that were read."""
    left_out: dict[str, int]
    """Captions and texts that are no fault but empty."""
    skipped: tuple[tuple[str, str], ...]
    """(source, reason) of each sample that cannot be used."""
    divided: tuple[tuple[str, str], ...]
    """(source, reason) of each row that shows held-out pictures and others: it is on neither side."""

    def save(self, prefix: Path) -> None:
        """Raises InputError: it cannot be written."""
        with writing(prefix, "output_prefix"), replacing(dataset_path(prefix, _REPORT)) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, prefix: Path) -> "Report | None":
        """None where there is none of this version."""
        try:
            content: dict[str, Any] = json.loads(dataset_path(prefix, _REPORT).read_text(encoding="utf-8"))
            shard = content["shard"] and tuple(content["shard"])
            named = {name: tuple(map(tuple, content[name])) for name in ("skipped", "divided")}
            report = cls(**{**content, "shard": shard, **named})
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return report if report.format_version == REPORT_VERSION else None

    def lines(self) -> list[str]:
        """What was left out, in words."""
        bad = BadSamples(1.0)
        for source, reason in self.skipped:
            bad.add(source, reason)
        left_out = self.left_out | ({_DIVIDED: len(self.divided)} if self.divided else {})
        return [f"left out: {count:,} {what}" for what, count in left_out.items()] + bad.lines()


def forget(prefix: Path) -> None:
    """From here on the datasets of a prefix are not known to be complete."""
    dataset_path(prefix, _REPORT).unlink(missing_ok=True)


def split_prefix(prefix: Path, split: str) -> Path:
    """Of the dataset of a split."""
    return dataset_path(prefix, f"_{split}")


def shard_prefix(output_prefix: str | Path, shard: int, num_shards: int) -> Path:
    """What stands for the output prefix in the files of a shard."""
    return Path(f"{output_prefix}-{shard:05d}-of-{num_shards:05d}") if num_shards > 1 else Path(output_prefix)


def refuse_stale_valid(output_prefix: Path, splits: tuple[str, ...]) -> None:
    """Raises InputError: another run's held-out documents, which may be among this run's training documents."""
    stale = dataset_path(output_prefix, f"_{VALID}.idx")
    if VALID not in splits and stale.exists():
        raise InputError(f"{stale} is left from a run with another valid_fraction: remove {stale.stem}.* first")


def refuse_empty(documents: dict[str, int], output_prefix: Path, why: str) -> None:
    """Raises InputError: a dataset has no document."""
    total = sum(documents.values())
    if not total:
        raise InputError(f"{output_prefix}_{TRAIN} would be empty: no input gave a document")
    for split, count in documents.items():
        if not count:
            raise InputError(f"{output_prefix}_{split} would be empty: {why} leaves it none of the {total} documents")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one process has to do."""

    config: PreprocessConfig
    vocabulary: Vocabulary
    inputs: Inputs
    units: tuple[Unit, ...]
    """Of its shard."""
    shard: tuple[int, int]
    recipe: str

    @classmethod
    def find(cls, config: PreprocessConfig) -> "Work":
        """Raises InputError: unreadable or contradicting inputs."""
        shard = shard_of_job(config.shard_index, config.num_shards)
        vocabulary = Vocabulary.load(config.vocab)
        inputs = Inputs.find(config)
        work = cls(
            config=config,
            vocabulary=vocabulary,
            inputs=inputs,
            units=tuple(deal(inputs.units, *shard)),
            shard=shard,
            recipe=inputs.recipe(config, vocabulary),
        )
        inputs.vision_tokenizer(vocabulary)
        if not work.is_shard:
            refuse_stale_valid(work.prefix, work.splits)
        return work

    @property
    def is_shard(self) -> bool:
        """Whether other processes have other parts of the inputs."""
        return self.shard[1] > 1

    @property
    def prefix(self) -> Path:
        """Of what it writes."""
        return shard_prefix(self.config.output_prefix, *self.shard)

    @property
    def splits(self) -> tuple[str, ...]:
        return (TRAIN, VALID) if self.config.valid_fraction else (TRAIN,)

    @property
    def size(self) -> int:
        """Bytes it reads."""
        return sum(unit.size for unit in self.units)

    def finished(self) -> Report | None:
        """The report of an earlier run of the same inputs and options whose datasets are still whole."""
        report = Report.read(self.prefix)
        own = self.shard if self.is_shard else None
        if report is None or (report.recipe, report.shard) != (self.recipe, own) or self.config.overwrite:
            return None
        return report if all(is_whole(split_prefix(self.prefix, split)) for split in self.splits) else None

    def do(self, on_read: Callable[[int], None]) -> Report:
        """Write the datasets. Nothing appears under the final names before everything is complete.

        Raises:
            InputError: unreadable inputs, too many bad samples, a dataset that would be empty, a full disk.
        """
        config = self.config
        encoder = Encoder(
            config=config,
            vocabulary=self.vocabulary,
            lookup=MediaIndex(self.inputs.row_folders if any(unit.kind == "rows" for unit in self.units) else ()),
            held_out=find_held_out(
                self.inputs.tars if any(unit.kind != "text" for unit in self.units) else (),
                self.inputs.row_files,
                self.inputs.tables,
                fraction=config.valid_fraction,
                distance=config.duplicate_distance,
                cache=self.prefix.parent / CACHE,
                workers=config.workers,
            ),
        )
        tokenizer = self.inputs.vision_tokenizer(self.vocabulary)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(DocumentWriter(split_prefix(self.prefix, split), self.vocabulary, tokenizer))
                for split in self.splits
            }
            report = self._write(encoder, writers, on_read)
            if not self.is_shard:
                refuse_empty(report.documents, self.prefix, f"valid_fraction {config.valid_fraction}")
            for writer in writers.values():
                writer.prepare()
            with writing(self.prefix, "output_prefix"):
                forget(self.prefix)
                publish([writer.prefix for writer in writers.values()])
        report.save(self.prefix)
        return report

    def _write(self, encoder: Encoder, writers: dict[str, DocumentWriter], on_read: Callable[[int], None]) -> Report:
        bad, samples, left_out = BadSamples(self.config.max_bad_fraction), 0, Counter()
        divided: list[tuple[str, str]] = []
        batches = read_batches(self.units, self.config, on_read)
        known = [unit.samples for unit in self.units]
        total = None if None in known else sum(known)
        for result in map_forked(encoder.encode, batches, self.config.workers):
            for split, documents in result.documents.items():
                writers[split].add_encoded(documents)
            samples += result.samples
            left_out += result.left_out
            divided += result.divided
            for source, reason in result.bad:
                bad.add(source, reason)
            bad.check_early(samples, total)
        bad.check(samples)
        return Report(
            recipe=self.recipe,
            shard=self.shard if self.is_shard else None,
            documents={split: len(writer) for split, writer in writers.items()},
            samples=samples,
            left_out=dict(sorted(left_out.items())),
            skipped=tuple(bad.samples),
            divided=tuple(divided),
        )
