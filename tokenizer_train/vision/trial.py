"""A training's first steps without its run folder, for whoever times them."""

import contextlib
from collections.abc import Iterator

from megatron_ext.runtime import Topology
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig
from tokenizer_train.vision.data import TrainingMedia
from tokenizer_train.vision.optimizer import NetworkOptimizer
from tokenizer_train.vision.parallel import Replicas
from tokenizer_train.vision.start import initial_tokenizer
from tokenizer_train.vision.step import TrainStep


@contextlib.contextmanager
def trial_steps(config: VisionTokenizerTrainingConfig, topology: Topology) -> Iterator[TrainStep]:
    """The steps of a training from its beginning, with media and decoding threads of their own. `config` names the
    precision: auto is settled.

    Raises:
        InputError: as a start of the training.
    """
    media = TrainingMedia(
        config.media,
        seed=config.train.seed,
        chunk_frames=config.model.temporal_downsample_factor,
        spatial_factor=config.model.spatial_factor,
    )
    with contextlib.closing(media):
        start = initial_tokenizer(config)
        model = start.model.train()
        optimizer = NetworkOptimizer(model, config.optim, config.train.train_steps, units=start.units)
        yield TrainStep(config, model, optimizer, media, Replicas(topology))
