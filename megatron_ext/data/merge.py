"""Datasets one after the other as one: the bytes that preprocessing their inputs in one go would have given.

Memory does not grow with the datasets. Everything is written under temporary names and renamed when complete: a merge
that was killed is done again, at the speed of the disk.
"""

import hashlib
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.config import InputError
from megatron_ext.data.index_file import read_lengths, write_index
from megatron_ext.data.manifest import (
    FILES,
    FORMAT_VERSION,
    Manifest,
    blocks,
    dataset_path,
    discard,
    file_facts,
    is_whole,
    partial_path,
    publish,
)
from megatron_ext.data.preprocess import (
    Report,
    forget,
    refuse_empty,
    refuse_stale_valid,
    shard_prefix,
    split_prefix,
)
from megatron_ext.data.sidecar import Sidecar, write_sidecar
from megatron_ext.files import writing


class Each(Sequence):
    """What `read` gives for each prefix, read anew whenever it is asked: ten thousand shards are not open at once."""

    def __init__(self, prefixes: Sequence[Path], read: Callable[[Path], object]) -> None:
        self._prefixes = prefixes
        self._read = read

    def __len__(self) -> int:
        return len(self._prefixes)

    def __getitem__(self, number: int) -> object:
        return self._read(self._prefixes[number])


def shards_of(output_prefix: str | Path, num_shards: int | None) -> dict[Path, Report]:
    """The shards' prefixes, in order, and their reports.

    Raises:
        InputError: there is none, one is missing, or they were made of different inputs or with different options.
    """
    output_prefix = Path(output_prefix)
    pattern = re.compile(re.escape(output_prefix.name) + r"-(\d{5,})-of-(\d{5,})\.report\.json")
    names = [path.name for path in output_prefix.parent.glob("*.report.json")] if output_prefix.parent.is_dir() else []
    counts = {int(match[2]) for match in map(pattern.fullmatch, names) if match}
    if num_shards is None and len(counts) != 1:
        found = f"there are shards of runs with num_shards {sorted(counts)}" if counts else "there is no finished shard"
        raise InputError(f"output_prefix {output_prefix}: {found}: run preprocess_data.py for each, or give num_shards")
    num_shards = num_shards or counts.pop()
    reports = {}
    for number in range(num_shards):
        prefix = shard_prefix(output_prefix, number, num_shards)
        report = Report.read(prefix)
        if report is not None:
            reports[prefix] = report
    missing = [number for number in range(num_shards) if shard_prefix(output_prefix, number, num_shards) not in reports]
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{len(missing)} of {num_shards} shards of {output_prefix} are not finished: {named}")
    recipes = Counter(report.recipe for report in reports.values())
    if len(recipes) > 1:
        usual = recipes.most_common(1)[0][0]
        other = next(prefix for prefix, report in reports.items() if report.recipe != usual)
        raise InputError(f"{other} was made of other inputs or with other options than other shards: make it again")
    return reports


def merged_report(reports: Sequence[Report]) -> Report:
    """That of one run over everything."""
    documents, left_out = Counter(), Counter()
    for report in reports:
        documents.update(report.documents)
        left_out.update(report.left_out)
    return replace(
        reports[0],
        shard=None,
        documents={split: documents[split] for split in reports[0].documents},
        samples=sum(report.samples for report in reports),
        left_out=dict(sorted(left_out.items())),
        skipped=tuple(itertools.chain.from_iterable(report.skipped for report in reports)),
        divided=tuple(itertools.chain.from_iterable(report.divided for report in reports)),
    )


def merge_shards(
    output_prefix: str | Path, num_shards: int | None, overwrite: bool, on_copied: Callable[[int], None]
) -> tuple[Report, bool]:
    """Join the shards that preprocess_data.py wrote; returns their report, and whether that was done before.

    Raises:
        InputError: as `shards_of` and `join`; a dataset would be empty.
    """
    reports = shards_of(output_prefix, num_shards)
    report, output_prefix = merged_report(list(reports.values())), Path(output_prefix)
    targets = {split: split_prefix(output_prefix, split) for split in report.documents}
    if Report.read(output_prefix) == report and all(map(is_whole, targets.values())) and not overwrite:
        return report, True
    refuse_stale_valid(output_prefix, tuple(targets))
    refuse_empty(report.documents, output_prefix, "the held-out share of the shards")
    try:
        for split, target in targets.items():
            join([split_prefix(prefix, split) for prefix in reports], target, on_copied)
        with writing(output_prefix, "output_prefix"):
            forget(output_prefix)
            publish(list(targets.values()))
    finally:
        for target in targets.values():
            discard(target)
    report.save(output_prefix)
    return report, False


def merge_datasets(inputs: Sequence[str], output_prefix: str, on_copied: Callable[[int], None]) -> Manifest:
    """Join datasets in the order given.

    Raises:
        InputError: as `join`; the output is one of the inputs.
    """
    target = Path(output_prefix)
    if target.resolve() in [Path(prefix).resolve() for prefix in inputs]:
        raise InputError(f"output_prefix {output_prefix} is one of inputs: give another name")
    try:
        manifest = join([Path(prefix) for prefix in inputs], target, on_copied)
        refuse_empty({"train": manifest.num_documents}, target, "")
        with writing(target, "output_prefix"):
            publish([target])
    finally:
        discard(target)
    return manifest


def join(prefixes: Sequence[Path], target: Path, on_copied: Callable[[int], None]) -> Manifest:
    """Write the partial files of the dataset that has the documents of all `prefixes`, for `publish`.

    `on_copied` is told how many more bytes of ids are copied.

    Raises:
        InputError: a dataset is incomplete or damaged, or of another vocabulary or vision tokenizer than the first.
    """
    manifests = [Manifest.read(dataset_path(prefix, ".manifest.json")) for prefix in prefixes]
    tokenizer = _agreed(prefixes, manifests)
    for prefix in prefixes:
        if not is_whole(prefix):
            raise InputError(f"{prefix}: {', '.join(FILES)} are not as its manifest says: preprocess the data again")
    with writing(target, "output_prefix"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial_path(target, ".bin").open("wb") as file:
            digest = hashlib.sha256()
            for prefix, manifest in zip(prefixes, manifests, strict=True):
                for block in _content(prefix, manifest):
                    file.write(block)
                    digest.update(block)
                    on_copied(len(block))
            ids = {"bytes": file.tell(), "sha256": digest.hexdigest()}
        write_index(
            partial_path(target, ".idx"), Each(prefixes, lambda prefix: read_lengths(dataset_path(prefix, ".idx")))
        )
        sidecars = Each(prefixes, lambda prefix: Sidecar.read(dataset_path(prefix, ".spans.npz")))
        sidecar = write_sidecar(partial_path(target, ".spans.npz"), sidecars)
        shutil.copytree(
            dataset_path(prefixes[0], ".vocabulary"), partial_path(target, ".vocabulary"), dirs_exist_ok=True
        )
        facts = {suffix: file_facts(partial_path(target, suffix)) for suffix in (".idx", ".spans.npz")}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            vocabulary=manifests[0].vocabulary,
            vision_tokenizer=tokenizer,
            documents=_added(manifest.documents for manifest in manifests),
            ids=_added(manifest.ids for manifest in manifests),
            visual_ids=sum(manifest.visual_ids for manifest in manifests),
            longest=max(manifest.longest for manifest in manifests),
            files={".bin": ids, **facts},
            sidecar=sidecar,
        )
        manifest.save(partial_path(target, ".manifest.json"))
    return manifest


def _agreed(prefixes: Sequence[Path], manifests: Sequence[Manifest]) -> str | None:
    """The vision tokenizer of all."""
    named: dict[str, Path] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.vocabulary != manifests[0].vocabulary:
            raise InputError(
                f"{prefixes[0]} was made with vocabulary {manifests[0].vocabulary}, {prefix} with "
                f"{manifest.vocabulary}: preprocess all data with one"
            )
        if manifest.vision_tokenizer is not None:
            named.setdefault(manifest.vision_tokenizer, prefix)
    if len(named) > 1:
        (one, first), (two, second) = list(named.items())[:2]
        raise InputError(
            f"{first} was made by vision tokenizer {one}, {second} by {two}: tokenize all media of a dataset with one"
        )
    return next(iter(named), None)


def _content(prefix: Path, manifest: Manifest) -> Iterator[bytes]:
    """The ids of a dataset, in blocks, compared with its manifest's hash."""
    digest = hashlib.sha256()
    path = dataset_path(prefix, ".bin")
    for block in blocks(path):
        digest.update(block)
        yield block
    if digest.hexdigest() != manifest.files[".bin"]["sha256"]:
        raise InputError(f"{path} does not have its manifest's sha256: it is damaged, preprocess the data again")


def _added(counts: Iterator) -> dict[str, int]:
    """Sums by kind, kinds without a document included."""
    total: dict[str, int] = {}
    for each in counts:
        for kind, count in each.items():
            total[kind] = total.get(kind, 0) + count
    return total
