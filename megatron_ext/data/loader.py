"""Global batches of a run: a function of (seed, consumed samples) and nothing else.

The loader keeps no state: told how many samples the run has consumed, it gives the next global batch. Where a restart
changed the blend, it also knows what the run had read of each dataset by then (progress.py). Data rank r of R
holds in microbatch k the samples consumed + (k * R + r) * micro_batch_size + j: the global batch is the same set of
windows for every layout.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_ext.config import InputError
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.data.batch import Batch, collate, slice_for_context
from megatron_ext.data.object_store import is_remote
from megatron_ext.data.order import Blend
from megatron_ext.data.packing import SHORTEST_CUT, PackingRules
from megatron_ext.data.progress import BlendChange, BlendProgress, DatasetProgress, go_on
from megatron_ext.data.synthetic import RandomDocuments
from megatron_ext.data.windows import PackedDataset
from megatron_ext.vocab import Vocabulary

_NAMED = 5
"""Source keys that a message names."""


class BatchTopology(Protocol):
    """What the loader needs to know of a rank."""

    data_parallel_rank: int
    data_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int


class Loader:
    """One blend of datasets, as this rank sees it. Use `build_data`."""

    def __init__(
        self,
        datasets: Sequence[PackedDataset | RandomDocuments],
        weights: Sequence[float],
        *,
        attention_scope: str,
        train: TrainConfig,
        topology: BatchTopology,
    ):
        self.datasets = tuple(datasets)
        self.dataset_names = _short_names([dataset.name for dataset in datasets])
        self._weights = tuple(weights)
        self._blend = Blend(weights, [len(dataset) for dataset in datasets], train.seed, self.dataset_names)
        self._past: tuple[DatasetProgress, ...] = ()
        self._attention_scope = attention_scope
        self._train = train
        self._topology = topology

    def microbatches(self, consumed_samples: int) -> list[Batch]:
        """This rank's microbatches of the global batch after `consumed_samples` samples of the run."""
        return [
            slice_for_context(
                collate(
                    [self.datasets[dataset][window] for dataset, window in places],
                    [dataset for dataset, _ in places],
                    self._attention_scope,
                ),
                self._topology.context_parallel_rank,
                self._topology.context_parallel_size,
            )
            for places in self.places(consumed_samples)
        ]

    def places(self, consumed_samples: int) -> list[list[tuple[int, int]]]:
        """(dataset, window) of each window of each of this rank's microbatches."""
        size = self._train.micro_batch_size
        ranks = self._topology.data_parallel_size
        first = consumed_samples + self._topology.data_parallel_rank * size
        return [
            [self._blend[start + j] for j in range(size)]
            for start in range(first, consumed_samples + self._train.batch_size_after(consumed_samples), ranks * size)
        ]

    def seen_by(self, topology: BatchTopology) -> "Loader":
        """The same blend as another rank sees it."""
        loader = copy.copy(self)
        loader._topology = topology
        return loader

    def own_keys(self, consumed_samples: int) -> list[tuple[str, ...]]:
        """Source keys of each of this rank's microbatches."""
        return [
            tuple(key for dataset, window in places for key in self.datasets[dataset].keys(window))
            for places in self.places(consumed_samples)
        ]

    def keys(self, consumed_samples: int) -> list[tuple[str, ...]]:
        """Source keys of each window of the whole global batch, the same on every rank; for naming a step's data."""
        return [
            self.datasets[dataset].keys(window)
            for dataset, window in (
                self._blend[consumed_samples + j] for j in range(self._train.batch_size_after(consumed_samples))
            )
        ]

    def progress(self, consumed_samples: int) -> BlendProgress:
        """What the run has read of each dataset after `consumed_samples` samples, for its checkpoint."""
        blend = self._blend
        return BlendProgress(
            seed=self._train.seed,
            first_sample=blend.start.sample,
            datasets=(
                *(
                    DatasetProgress(
                        name=name,
                        identity=dataset.identity,
                        number=blend.start.numbers[place],
                        slots=blend.slots[place],
                        before=blend.start.consumed[place],
                        consumed=blend.consumed(place, consumed_samples),
                    )
                    for place, (name, dataset) in enumerate(zip(self.dataset_names, self.datasets, strict=True))
                ),
                *self._past,
            ),
        )

    def resumed(
        self, saved: BlendProgress, consumed_samples: int, allow_change: bool
    ) -> tuple["Loader", BlendChange | None]:
        """The same datasets and weights as the run goes on with them after a checkpoint, and what changed.

        Raises:
            InputError: another seed; datasets that came or went, without `allow_change`.
        """
        next_ = go_on(saved, self.progress(0), consumed_samples, allow_change)
        loader = copy.copy(self)
        loader._past = next_.past
        loader._blend = Blend(self._weights, self._blend.sizes, self._train.seed, self.dataset_names, next_.start)
        return loader, next_.change

    @property
    def identity(self) -> str:
        """Names the endless sequence of windows: with equal identities, equal consumed samples mean equal data."""
        content = [self._train.seed, self._blend.slots, [dataset.identity for dataset in self.datasets]]
        if self._blend.start.sample:
            content.append(asdict(self._blend.start))
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

    def summary(self, samples: int) -> list[str]:
        """One line per dataset: size, fill, epochs in a run of `samples` windows, and what could not be packed."""
        lines = []
        for number, (name, dataset) in enumerate(zip(self.dataset_names, self.datasets, strict=True)):
            share = self._blend.slots[number] / self._blend.period
            lines.append(
                f"{name}: {len(dataset.documents):,} documents in {len(dataset):,} windows of {dataset.seq_length:,}, "
                f"{dataset.fill:.2%} full, {share:.2%} of the windows, {self._blend.epoch(number, samples):.2f} epochs"
            )
            if skipped := dataset.skipped_keys:
                lines.append(
                    f"{name}: {len(skipped):,} documents skipped, a picture or frame exceeds a window: {first(skipped)}"
                )
        return lines


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: Loader
    valid: Loader | None
    """None where data.valid is empty."""

    vision_tokenizer: str | None
    """Identity of the vision tokenizer of all pictures; None where there are none."""

    change: BlendChange | None = None
    """How this start changed the blend of the checkpoint that it goes on from."""

    def resumed(self, saved: BlendProgress | None, consumed_samples: int, allow_change: bool) -> "Data":
        """The data as a run goes on with it after a checkpoint that holds `saved`; the held-out data stays.

        Raises:
            InputError: another seed; without `allow_change`: datasets that came or went, or a checkpoint that does not
                say what it has read.
        """
        if saved is None:
            if consumed_samples and not allow_change:
                raise InputError(
                    f"the checkpoint has consumed {consumed_samples:,} samples and does not say of which datasets: set "
                    "data.allow_change true to go on as if of these"
                )
            return self
        loader, change = self.train.resumed(saved, consumed_samples, allow_change)
        return replace(self, train=loader, change=change)


def build_data(data: DataConfig, train: TrainConfig, vocabulary: Vocabulary, topology: BatchTopology) -> Data:
    """Open, check and pack all datasets. Sizes that span sections are checked before, by `config.validate`.

    Raises:
        InputError: an incomplete dataset or one of another vocabulary; datasets of different vision tokenizers; too
            many documents that do not fit.
    """
    rules = PackingRules(
        seq_length=train.seq_length,
        alignment=data.document_alignment,
        shortest_cut=SHORTEST_CUT if data.cut_text_to_fill else 0,
        seed=data.packing_seed,
    )
    cache_dir = data.cache_dir
    if cache_dir is None and not is_remote(data.train[0].prefix):
        cache_dir = str(Path(data.train[0].prefix).parent / "packing_cache")
    packed = {
        section: [
            PackedDataset(
                dataset.prefix,
                vocabulary,
                rules,
                cache_dir,
            )
            for dataset in datasets
        ]
        for section, datasets in (("train", data.train), ("valid", data.valid))
    }
    for dataset in (*packed["train"], *packed["valid"]):
        _refuse_misfits(dataset, data.max_bad_fraction)
    vision_tokenizer = _one_vision_tokenizer([*packed["train"], *packed["valid"]])

    def loader(datasets: list[PackedDataset], blend: tuple[DatasetConfig, ...], sizes: TrainConfig) -> Loader:
        weights = [dataset.weight for dataset in blend]
        return Loader(datasets, weights, attention_scope=data.attention_scope, train=sizes, topology=topology)

    full_size = dataclasses.replace(train, global_batch_size_ramp=None)
    return Data(
        train=loader(packed["train"], data.train, train),
        valid=loader(packed["valid"], data.valid, full_size) if data.valid else None,
        vision_tokenizer=vision_tokenizer,
    )


def _refuse_misfits(dataset: PackedDataset, max_fraction: float) -> None:
    """Documents that cannot be packed are bad samples: skipped, and named by `Loader.summary`, up to a share."""
    misfits, total = len(dataset.index.skipped_documents), len(dataset.documents)
    if misfits > max_fraction * total:
        raise InputError(
            f"{dataset.documents.prefix}: {misfits:,} of {total:,} documents hold a picture or frame longer than "
            f"train.seq_length {dataset.seq_length}, more than data.max_bad_fraction {max_fraction:g} "
            f"({first(dataset.skipped_keys)}): raise train.seq_length, or data.max_bad_fraction to train without them"
        )


def first(keys: Sequence[str]) -> str:
    """The first keys, for a message."""
    return ", ".join(keys[:_NAMED]) + (", ..." if len(keys) > _NAMED else "")


def _one_vision_tokenizer(datasets: Sequence[PackedDataset]) -> str | None:
    """Visual ids of different tokenizers mean different things: a blend has one, or none."""
    seen: dict[str, Path] = {}
    for dataset in datasets:
        identity = dataset.documents.manifest.vision_tokenizer
        if identity is not None:
            seen.setdefault(identity, dataset.documents.prefix)
    if len(seen) > 1:
        (first, first_prefix), (second, second_prefix), *_ = seen.items()
        raise InputError(
            f"data: {first_prefix} was made by vision tokenizer {first}, {second_prefix} by {second}: "
            "tokenize all pictures of a run with one tokenizer"
        )
    return next(iter(seen), None)


def _short_names(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The prefixes' last parts, or the whole prefixes where these are not distinct."""
    names = tuple(Path(prefix).name for prefix in prefixes)
    return names if len(set(names)) == len(names) else tuple(prefixes)
