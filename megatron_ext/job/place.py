"""What can be known before a job waits in the queue: its ranks, its files, its run folder, the disk's room."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ext.checkpoint import latest_checkpoint, read_metadata
from megatron_ext.checkpoint.room import OPTIMIZER_BYTES, check_room
from megatron_ext.config import InputError
from megatron_ext.config.run import RunConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.config.validate import possible_precisions, validate
from megatron_ext.files import check_folder
from megatron_ext.plan import DecoderShape, count_parameters
from megatron_ext.vocab import Vocabulary

DATASET_FILES = (".manifest.json", ".bin", ".idx")
"""Without these a dataset is none; what else belongs to it is made again where it is absent."""

OBJECT_STORE = "://"
"""In a prefix that is no path: what lies there is looked at by the run itself, with the credentials of its nodes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the queue."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node

    @classmethod
    def of(cls, options: Sequence[str]) -> "Request":
        """What sbatch's `options` ask for; what they leave open comes from sbatch's variables, as in sbatch.

        A node runs --ntasks-per-node ranks; without it one for each GPU, and one where there is no GPU.

        Raises:
            InputError: a number that is none.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-N", "--nodes", default="1")
        parser.add_argument("--gpus-per-node", default=os.environ.get("SBATCH_GPUS_PER_NODE") or "0")
        parser.add_argument("--ntasks-per-node", default=None)
        try:
            asked, _ = parser.parse_known_args(options)
        except argparse.ArgumentError as error:
            raise InputError(f"option for sbatch: {error}") from None
        gpus = _number("--gpus-per-node", asked.gpus_per_node.rpartition(":")[2])  # of a kind: a100:8
        tasks = asked.ntasks_per_node
        return cls(
            nodes=_number("--nodes", asked.nodes),
            gpus_per_node=gpus,
            ranks_per_node=max(gpus, 1) if tasks is None else _number("--ntasks-per-node", tasks),
        )


def _number(option: str, value: str) -> int:
    if not value.isdecimal():
        raise InputError(f"{option} {value}: give one whole number; the layout of the ranks depends on it")
    return int(value)


def check_place(config: RunConfig, request: Request) -> None:
    """Raise InputError, one line, where a job of this configuration could not start or would not be allowed to."""
    _check_devices(config.runtime, request)
    validate(config, request.world_size)
    _check_files(config)
    run_folder = Path(config.observe.run_dir)
    check_folder(run_folder, "observe.run_dir")
    saved = latest_checkpoint(run_folder / "checkpoints")
    if saved is not None:
        _check_same_run(config, saved)
    shape = DecoderShape.of(config.model)
    parameters = count_parameters(shape, Vocabulary.load(config.vocab).layout.size).total
    on_gpu = config.runtime.device != "cpu" and request.gpus_per_node > 0
    possible = possible_precisions(config.runtime.precision, on_gpu=on_gpu)
    weight_bytes = 4 if "fp32" in possible else 2
    bytes_each = parameters * (weight_bytes + OPTIMIZER_BYTES)
    check_room(run_folder / "checkpoints", bytes_each, config.checkpoint.keep)


def _check_devices(runtime: RuntimeConfig, request: Request) -> None:
    if runtime.device == "cpu":
        return
    gpus, ranks = request.gpus_per_node, request.ranks_per_node
    if gpus == 0 and runtime.device != "auto":
        raise InputError(
            f"runtime.device is {runtime.device!r} and the job asks for no GPU: give --gpus-per-node, set "
            "SBATCH_GPUS_PER_NODE in the site file, or set runtime.device to cpu"
        )
    if 0 < gpus < ranks:
        raise InputError(
            f"--ntasks-per-node {ranks} is more than --gpus-per-node {gpus}: a rank needs a GPU of its own"
        )


def _check_files(config: RunConfig) -> None:
    prefixes = [dataset.prefix for dataset in (*config.data.train, *config.data.valid)]
    for prefix in (prefix for prefix in prefixes if OBJECT_STORE not in prefix):
        for suffix in DATASET_FILES:
            if not Path(prefix + suffix).is_file():
                raise InputError(
                    f"{prefix}{suffix} is missing: give data prefixes that tools/preprocess_data.py wrote, "
                    f"from {Path.cwd()} or as absolute paths"
                )
    source = config.checkpoint.init_from
    if source is not None and not Path(source).exists():
        raise InputError(f"checkpoint.init_from {source!r} is not there: give a checkpoint, run or Hugging Face folder")


def _check_same_run(config: RunConfig, saved: Path) -> None:
    """What training itself would refuse to go on from, as far as it shows without reading the data."""
    metadata = read_metadata(saved)
    ours = {
        "vocabulary": Vocabulary.load(config.vocab).identity,
        "model": DecoderShape.of(config.model).identity,
    }
    for name, identity in ours.items():
        if metadata.get(name, identity) != identity:
            raise _another(saved, f"{name} {metadata[name]}", identity)
    then = yaml.safe_load((saved / "config.yaml").read_text(encoding="utf-8"))
    windows = [] if config.data.allow_change else [("train", "seq_length"), ("data", "document_alignment")]
    for section, name in (("train", "seed"), *windows):
        before, now = then[section][name], getattr(getattr(config, section), name)
        if before != now:
            raise _another(saved, f"{section}.{name} {before}", now)


def _another(saved: Path, before: str, now: object) -> InputError:
    return InputError(
        f"{saved} was trained with {before}, this configuration has {now}: go on with what the checkpoint was trained "
        "with, or choose another observe.run_dir"
    )
