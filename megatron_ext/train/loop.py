"""Fit: the loop over optimizer steps, with evaluation, saving and stopping."""

import dataclasses
import math
import time

import torch

from megatron_ext.checkpoint.attempt import SaveOutcome
from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.config.errors import InputError
from megatron_ext.config.train import TrainConfig
from megatron_ext.data.loader import Data, first
from megatron_ext.objectives import Objective
from megatron_ext.observe import Run
from megatron_ext.optim import Optimizer
from megatron_ext.resilience import Stopping
from megatron_ext.runtime import Topology
from megatron_ext.runtime.device import peak_memory_bytes, synchronize
from megatron_ext.train.garbage import collected_every
from megatron_ext.train.state import TrainState
from megatron_ext.train.step import MicrobatchRunner

LAST_ATTEMPTS = 2
"""At the last step of a start nothing comes after that could try again."""

MOST_RANKS = 3
"""Ranks that the line about a loss that is not finite names."""


class Trainer:
    """Trains a decoder to the last step of its run."""

    def __init__(
        self,
        train: TrainConfig,
        data: Data,
        objective: Objective,
        optimizer: Optimizer,
        checkpoint: DecoderCheckpoint,
        topology: Topology,
        run: Run,
    ) -> None:
        self.train = train
        self.data = data
        self.optimizer = optimizer
        self.checkpoint = checkpoint
        self.topology = topology
        self.run = run
        self.runner = MicrobatchRunner(optimizer.model, objective, topology, seed=train.seed)

    def fit(self, state: TrainState) -> TrainState:
        """Train until the last step, the exit interval or a signal. The state reached is saved."""
        self.run.truncate_after(state.step)
        if self.data.change is not None:
            self.run.log_event("blend", step=state.step, **dataclasses.asdict(self.data.change))
        if state.step >= self.train.train_steps:
            self.run.console.print(f"nothing to do: step {state.step} of {self.train.train_steps} is done")
            return state
        for line in self.data.train.summary(self.train.train_steps * self.train.global_batch_size):
            self.run.console.print(line, markup=False, soft_wrap=True)
        with (
            Stopping.watch(self.train, self.run.folder, self.topology) as stopping,
            collected_every(self.train.manual_gc_interval) as collect,
            self.run.profiler(self.topology) as profiler,
        ):
            self._dry_step(state)
            while state.step < self.train.train_steps:
                with profiler.step(state.step + 1):
                    state = self._train_step(state)
                collect(state.step)
                self._report(self.checkpoint.poll())
                if self.train.eval_interval and state.step % self.train.eval_interval == 0:
                    self._evaluate(state)
                if reason := stopping.reason(state.step):
                    self.run.log_event("stop", step=state.step, reason=reason)
                    break
                if self.checkpoint.is_due(state.step):
                    self._start_save(state)
            self._save_last(state)
        return state

    def _dry_step(self, state: TrainState) -> None:
        """One microbatch forward and backward at full shape, thrown away: too large a batch fails at once."""
        train = self.data.train
        self.optimizer.zero_grad()
        self.runner.run(train.microbatches(state.consumed_samples)[:1], train.dataset_names, step=state.step)

    def _train_step(self, state: TrainState) -> TrainState:
        """One optimizer step and its line in the log."""
        started = time.perf_counter()
        microbatches = self.data.train.microbatches(state.consumed_samples)
        loaded = time.perf_counter()
        self.optimizer.zero_grad()
        losses = self.runner.run(microbatches, self.data.train.dataset_names, step=state.step)
        result = self.optimizer.step(state.step + 1)
        if not math.isfinite(result.grad_norm):
            self._report(self.checkpoint.finish())
            raise InputError(
                f"step {state.step + 1} has gradient norm {result.grad_norm} and loss {losses['loss']}; "
                f"{self._where_not_finite(state)}: nothing was saved since the last checkpoint; lower optim.lr or look "
                f"at the data (tools/inspect_data.py --step {state.step + 1})"
            )
        synchronize(self.topology.device)
        seconds = time.perf_counter() - started
        samples = self.train.global_batch_size
        blend = self.data.train.progress(state.consumed_samples + samples)
        state = state.advance(samples, self.train.seq_length, blend)
        self.run.log_metrics(
            {
                "step": state.step,
                **losses,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
                "timing": {
                    "tokens_per_second": self.train.global_batch_size * self.train.seq_length / seconds,
                    "step_seconds": seconds,
                    "data_seconds": loaded - started,
                    "peak_memory_gib": peak_memory_bytes(self.topology.device) / 2**30,
                },
            }
        )
        return state

    def _where_not_finite(self, state: TrainState) -> str:
        """The ranks whose loss is not finite and their documents, else the documents of the step. Every rank calls."""
        by_microbatch = self.data.train.own_keys(state.consumed_samples)
        mine = sorted({key for number in self.runner.not_finite() for key in by_microbatch[number]})
        gathered = self.topology.gather(mine)
        by_rank = dict(enumerate(gathered)) if gathered is not None else {self.topology.rank: mine}
        named = [f"rank {rank}'s loss is not finite, on documents {first(k)}" for rank, k in by_rank.items() if k]
        if named:
            return "; ".join(named[:MOST_RANKS]) + ("; ..." if len(named) > MOST_RANKS else "")
        every = sorted({key for window in self.data.train.keys(state.consumed_samples) for key in window})
        return f"every loss is finite, on documents {first(every)}"

    def _evaluate(self, state: TrainState) -> None:
        """Losses on the first global batches of the held-out blend, always the same ones."""
        started = time.perf_counter()
        valid = self.data.valid
        microbatches = [
            microbatch
            for index in range(self.train.eval_steps)
            for microbatch in valid.microbatches(index * self.train.global_batch_size)
        ]
        self.optimizer.model.eval()
        with torch.no_grad():
            losses = self.runner.run(microbatches, valid.dataset_names, step=state.step, forward_only=True)
        self.optimizer.model.train()
        named = {f"valid_{name}": value for name, value in losses.items()}
        self.run.log_metrics({"step": state.step, **named, "timing": {"eval_seconds": time.perf_counter() - started}})

    def _start_save(self, state: TrainState) -> None:
        """Begin to save, once the save before is over."""
        self._report(self.checkpoint.finish())
        self.checkpoint.start_save(state.step, state.as_dict())

    def _save_last(self, state: TrainState) -> None:
        """Save the state reached, unless it is, and wait for it; with a second attempt where the first fails."""
        outcome = self._report(self.checkpoint.finish())
        for _ in range(LAST_ATTEMPTS):
            if self.checkpoint.saved_step != state.step:
                self._start_save(state)
                outcome = self._report(self.checkpoint.finish())
        if self.checkpoint.saved_step != state.step:
            raise InputError(
                f"step {state.step} could not be saved in {self.checkpoint.store.root} ({outcome.failure}): make room "
                "or check permissions, and start the run again; it goes on from its last checkpoint"
            )

    def _report(self, outcome: SaveOutcome | None) -> SaveOutcome | None:
        """Log how a save ended, where one has; returns it."""
        if outcome is None:
            return None
        took = {"seconds": outcome.seconds, "blocked_seconds": outcome.blocked_seconds}
        if outcome.folder is not None:
            self.run.log_event("save", step=outcome.step, folder=outcome.folder.name, **took)
        else:
            self.run.log_event("save_failed", step=outcome.step, reason=outcome.failure, **took)
            self.run.console.print(
                f"step {outcome.step} was not saved ({outcome.failure}): the next due step tries again",
                markup=False, soft_wrap=True,
            )  # fmt: skip
        return outcome
