"""Join the shards of preprocess_data.py, or any datasets, into one: `python tools/merge_datasets.py --output_prefix P`.

The result has the bytes of preprocessing everything in one go. A merge that was interrupted starts anew; one that is
finished, of shards that have not changed, is not done again.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Count, Name, Section
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.manifest import Manifest, dataset_path
from megatron_ext.data.merge import merge_datasets, merge_shards, shards_of
from megatron_ext.data.preprocess import split_prefix
from megatron_ext.data.report import dataset_report
from megatron_ext.files import check_folder
from megatron_ext.observe.progress import progress


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Section):
    """Join the shards that preprocess_data.py wrote, or any datasets, into one."""

    output_prefix: Name
    """The output_prefix that preprocess_data.py was given, or with inputs the path of the joined dataset."""

    num_shards: Count | None = None
    """The num_shards that preprocess_data.py was given; default: that of the shards found."""

    inputs: tuple[Name, ...] = ()
    """List of prefixes of datasets to join in this order, instead of shards."""

    overwrite: bool = False
    """Join shards again that are joined already and have not changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs and self.num_shards is not None:
            raise InputError(f"inputs and num_shards {self.num_shards} exclude each other: give one of them")


def main(argv: list[str]) -> None:
    """Join what `argv` names and print the report of the result."""
    config = load(MergeConfig, argv, prog="merge_datasets.py")
    check_folder(Path(config.output_prefix).parent, "output_prefix")
    if config.inputs:
        prefixes = [Path(prefix) for prefix in config.inputs]
        with progress("merge", _size(prefixes), "bytes", Console()) as advance:
            merge_datasets(config.inputs, config.output_prefix, advance)
        print("\n".join(dataset_report(DocumentDataset.open(config.output_prefix))))
        return
    reports = shards_of(config.output_prefix, config.num_shards)
    splits = next(iter(reports.values())).documents
    size = _size([split_prefix(prefix, split) for prefix in reports for split in splits])
    with progress(f"merge {len(reports)} shards", size, "bytes", Console()) as advance:
        report, done_before = merge_shards(config.output_prefix, config.num_shards, config.overwrite, advance)
    if done_before:
        print(f"{config.output_prefix} is finished and nothing has changed: reused")
    for split in splits:
        print("\n".join(dataset_report(DocumentDataset.open(f"{config.output_prefix}_{split}"))))
    print("\n".join(report.lines()))


def _size(prefixes: list[Path]) -> int:
    """Bytes of ids."""
    manifests = (Manifest.read(dataset_path(prefix, ".manifest.json")) for prefix in prefixes)
    return sum(int(manifest.files[".bin"]["bytes"]) for manifest in manifests)


def cli() -> None:
    """Console script emu3-merge-datasets."""
    run_program(main)


if __name__ == "__main__":
    cli()
