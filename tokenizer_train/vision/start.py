"""With which weights a training begins."""

from pathlib import Path

import torch

from megatron_ext.checkpoint.store import read_metadata
from megatron_ext.config import InputError
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import torch_generator
from tokenizer_train.vision.from_2d import SUFFIXES_2D, Start, tokenizer_from_2d
from tokenizer_train.vision.initialize import near_identity


def initial_tokenizer(config: VisionTokenizerTrainingConfig) -> Start:
    """The tokenizer before its first step: that of checkpoint.init_from, else weights drawn from the seed.

    Raises:
        InputError: checkpoint.init_from has another shape, or section codebook would spoil what comes from it.
    """
    torch.manual_seed(torch_generator(config.train.seed, "weights").initial_seed())
    source = config.checkpoint.init_from
    if source is None:
        model = MoVQGAN(config.model)
        if config.train.init == "near_identity":
            near_identity(model)
        return Start(model=model, units={})
    if kmeans_batches := config.codebook.kmeans_batches:
        raise InputError(
            f"codebook.kmeans_batches = {kmeans_batches}: would replace the codes of checkpoint.init_from, set 0"
        )
    if Path(source).is_file() or Path(source).suffix in SUFFIXES_2D:
        return _from_2d(source, config)
    model = load_vision_tokenizer(source)
    if model.config != config.model:
        raise InputError(f"checkpoint.init_from = {source!r}: its shape is not that of section model")
    return Start(model=model, units={})


def saved_shape(config: VisionTokenizerTrainingConfig, checkpoint: Path) -> Start:
    """A tokenizer for the weights of a checkpoint; checkpoint.init_from need not be there any more."""
    units = read_metadata(checkpoint).get("units")
    if units is None:  # of a run from before they were kept
        return initial_tokenizer(config)
    return Start(model=MoVQGAN(config.model), units=units)


def _from_2d(source: str, config: VisionTokenizerTrainingConfig) -> Start:
    codebook = config.codebook
    start = tokenizer_from_2d(source, config.model)
    if start.num_new_codes and not 0 < codebook.restart_interval <= codebook.restart_until_step:
        raise InputError(
            f"codebook.restart_until_step = {codebook.restart_until_step}: the {start.num_new_codes} codes that "
            f"{source} does not have come into use by a restart alone; set at least restart_interval = "
            f"{codebook.restart_interval or 20}"
        )
    return start
