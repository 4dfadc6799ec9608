"""Open a decoder checkpoint outside of training: for export and generation, in one process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.checkpoint.decoder import load_weights
from megatron_ext.checkpoint.store import LATEST, latest_checkpoint, read_metadata
from megatron_ext.config.errors import InputError
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.model import Emu3Model, build_model
from megatron_ext.runtime import Topology
from megatron_ext.vocab import Vocabulary


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription:
    """What a decoder was trained with."""

    folder: Path
    """Its step_XXXXXXXX folder."""
    section: ModelConfig
    """Section `model` of its run."""
    vocab: Vocabulary
    seq_length: int
    """Ids in a training window: how far positions have been seen."""
    vision_tokenizer: str | None
    """Identity of the vision tokenizer of its data; None where it has none, or came from elsewhere."""

    def check_vision_tokenizer(self, identity: str, codebook_size: int) -> None:
        """Raise InputError unless codes of this vision tokenizer are what the decoder was trained on."""
        if codebook_size != self.vocab.layout.codebook_size:
            raise InputError(
                f"vision_tokenizer has {codebook_size} codes, the checkpoint's vocabulary "
                f"{self.vocab.layout.codebook_size}: give the vision tokenizer of its data"
            )
        if self.vision_tokenizer not in (None, identity):
            raise InputError(
                f"vision_tokenizer has identity {identity}, the checkpoint was trained on codes of "
                f"{self.vision_tokenizer}: give the vision tokenizer of its data"
            )


@dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint(CheckpointDescription):
    """A decoder with its weights."""

    model: Emu3Model


def describe_checkpoint(folder: str | Path) -> CheckpointDescription:
    """All but the weights of a step_XXXXXXXX folder, of the newest one in a `checkpoints` folder, or of a run folder.

    Raises:
        InputError: no checkpoint there, or one that cannot be read.
    """
    folder = find_checkpoint(folder)
    config = _read_config(folder / "config.yaml")
    return CheckpointDescription(
        folder=folder,
        section=ModelConfig(**config["model"]),
        vocab=Vocabulary.from_folder(folder / "vocabulary"),
        seq_length=config["train"]["seq_length"],
        vision_tokenizer=read_metadata(folder).get("vision_tokenizer"),
    )


def open_checkpoint(folder: str | Path, topology: Topology) -> OpenedCheckpoint:
    """The decoder that `describe_checkpoint` describes.

    Raises:
        InputError: no checkpoint there, or one that cannot be read.
    """
    described = describe_checkpoint(folder)
    model = build_model(described.section, ParallelConfig(), described.vocab.layout, topology, seed=0)
    load_weights(described.folder, model)
    return OpenedCheckpoint(model=model.eval(), **vars(described))


def precision_of_run(run_dir: str | Path) -> str | None:
    """What the newest checkpoint of a run folder was trained in; None where it has none.

    Raises:
        InputError: the checkpoint is damaged.
    """
    folder = latest_checkpoint(Path(run_dir) / "checkpoints")
    return None if folder is None else _read_config(folder / "config.yaml").get("runtime", {}).get("precision")


def find_checkpoint(folder: str | Path) -> Path:
    """The step folder that `folder` is, or the newest one below it.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    for root in (folder, folder / "checkpoints"):
        if (root / LATEST).is_file():
            return latest_checkpoint(root)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"checkpoint {str(folder)!r}: give a step_XXXXXXXX folder, or the folder that holds `latest`")
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["model"], config["train"]["seq_length"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); use a checkpoint that pretraining wrote") from None
    return config
