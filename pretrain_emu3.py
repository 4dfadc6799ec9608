"""Pretrain an Emu3 decoder by next-token prediction over text, image and video tokens.

torchrun --nproc-per-node N pretrain_emu3.py --config FILE [--section.field VALUE ...]
python pretrain_emu3.py --config FILE --dry_run --world_size N [--suggest]     # what it will cost; docs/planning.md
"""

import os
import signal

from megatron_ext.config import load, run_program, to_yaml
from megatron_ext.config.run import RunConfig
from megatron_ext.config.validate import validate
from megatron_ext.plan import take_question


def main(argv: list[str]) -> None:
    """Train the run that `argv` describes; resume it where it stopped. With --dry_run, plan it."""
    question, argv = take_question(argv)
    config = load(RunConfig, argv, prog="pretrain_emu3.py")
    if question:
        from megatron_ext.plan.report import answer

        return answer(question, config)
    validate(config, world_size=int(os.environ.get("WORLD_SIZE", 1)))
    train(config)


def train(config: RunConfig) -> None:
    """Compose the rooms and fit."""
    # Imported here, so that --help and --print_config answer at once.
    from megatron_ext.checkpoint.decoder import DecoderCheckpoint
    from megatron_ext.checkpoint.open import precision_of_run
    from megatron_ext.data import build_data
    from megatron_ext.model import build_model
    from megatron_ext.objectives import build_objective
    from megatron_ext.observe import Run
    from megatron_ext.optim import build_optimizer
    from megatron_ext.resilience import StopRequest
    from megatron_ext.resilience.notice import Notice
    from megatron_ext.runtime import Topology
    from megatron_ext.train import MicrobatchRunner, Trainer, resume_or_init
    from megatron_ext.vocab import Vocabulary

    vocab = Vocabulary.load(config.vocab)
    is_first = int(os.environ.get("RANK", 0)) == 0
    with (
        StopRequest.where_ignored(signal.SIGTERM) as told_before,
        Notice.at_end(config.resilience.notify, config.observe.run_dir, is_main=is_first) as notice,
        Topology.start(
            config.runtime, config.parallel, begun_in=lambda: precision_of_run(config.observe.run_dir)
        ) as topology,
        Run.open(
            config.observe,
            topology.is_main,
            config_yaml := to_yaml(config.computing_in(topology.precision.name)),
            total_steps=config.train.train_steps,
            environment=topology.environment,
        ) as run,
    ):
        run.tell_precision(topology.precision)
        data = build_data(config.data, config.train, vocab, topology)
        objective = build_objective(config.objective, vocab.layout)
        model = build_model(config.model, config.parallel, vocab.layout, topology, config.train.seed)
        optimizer = build_optimizer(config.optim, config.parallel, model, topology, config.train.train_steps)
        identities = {"vision_tokenizer": data.vision_tokenizer}
        checkpoint = DecoderCheckpoint(
            config.checkpoint, run.folder, optimizer, topology, vocab, identities, config_yaml
        )
        state = resume_or_init(config.checkpoint, checkpoint, optimizer, topology)
        data = data.resumed(state.blend, state.consumed_samples, config.data.allow_change)
        run.add_provenance(identities={**checkpoint.identities, "data": data.train.identity})
        runner = MicrobatchRunner(optimizer.model, objective, topology, seed=config.train.seed)
        trainer = Trainer(config.train, config.resilience, data, runner, optimizer, checkpoint, run)
        state = trainer.fit(state, told_before)
        notice.reached(state.step, config.train.train_steps)


def tells(error: Exception) -> bool:
    """Whether this rank is the one that reports what ends it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # no other ranks: a plan that fails needs no torch either
        return True
    from megatron_ext.runtime.faults import is_told_here

    return is_told_here(error)


def cli() -> None:
    """Console script emu3-pretrain."""
    run_program(main, tells=tells)


if __name__ == "__main__":
    cli()
