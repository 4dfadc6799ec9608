"""Fit: the loop over optimizer steps, with evaluation, saving and stopping."""

import dataclasses
import time

import torch

from megatron_ext.checkpoint.attempt import SaveOutcome
from megatron_ext.checkpoint.decoder import DecoderCheckpoint
from megatron_ext.config.errors import InputError
from megatron_ext.config.resilience import ResilienceConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.data.loader import Data, first
from megatron_ext.observe import Run
from megatron_ext.optim import Optimizer
from megatron_ext.resilience import Stopping, StopRequest, Watchdog
from megatron_ext.resilience.judgement import fault_of, remembered
from megatron_ext.resilience.rank_times import line_about, rank_times
from megatron_ext.resilience.replicas import differing_replicas, unlike_masters
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
        resilience: ResilienceConfig,
        data: Data,
        runner: MicrobatchRunner,
        optimizer: Optimizer,
        checkpoint: DecoderCheckpoint,
        run: Run,
    ) -> None:
        self.train = train
        self.resilience = resilience
        self.data = data
        self.optimizer = optimizer
        self.checkpoint = checkpoint
        self.topology = runner.topology
        self.run = run
        self.runner = runner
        self._bad_steps = 0
        self._watchdog = Watchdog(resilience, run.folder / "stacks", self.topology.rank, self._tell_of_hang)

    def fit(self, state: TrainState, told_before: StopRequest) -> TrainState:
        """Train until the last step, the exit interval or a signal, or for one step where a signal has come before. The
        state reached is saved."""
        self.run.truncate_after(state.step)
        if self.data.change is not None:
            self.run.log_event("blend", step=state.step, **dataclasses.asdict(self.data.change))
        if state.step >= self.train.train_steps:
            self.run.console.print(f"nothing to do: step {state.step} of {self.train.train_steps} is done")
            return state
        for line in self.data.train.summary(self.train.samples_of(self.train.train_steps)):
            self.run.console.print(line, markup=False, soft_wrap=True)
        with (
            Stopping.watch(self.train, self.run.folder, self.topology, told_before) as stopping,
            self._watchdog.watching(),
            collected_every(self.train.manual_gc_interval) as collect,
            self.run.profiler(self.topology) as profiler,
        ):
            self._dry_step(state)
            while state.step < self.train.train_steps:
                last = state.step
                self._watchdog.alive(f"step {last + 1}", is_step=True)
                with profiler.step(last + 1):
                    state = self._train_step(state)
                if state.step <= last:  # rewound: what follows its step was done when it was taken
                    continue
                self._watchdog.alive(f"what follows step {state.step}")
                collect(state.step)
                self._report(self.checkpoint.poll())
                self._check_replicas(state.step)
                if self.train.eval_interval and state.step % self.train.eval_interval == 0:
                    self._evaluate(state)
                if reason := stopping.reason(state.step):
                    self.run.log_event("stop", step=state.step, reason=reason)
                    break
                if self.checkpoint.is_due(state.step):
                    self._start_save(state)
            self._save_last(state)
        self.run.log_event("end", step=state.step, finished=state.step >= self.train.train_steps)
        return state

    def _dry_step(self, state: TrainState) -> None:
        """One microbatch forward and backward at full shape, thrown away: too large a batch fails at once."""
        train = self.data.train
        self.optimizer.zero_grad()
        self.runner.run(train.microbatches(state.consumed_samples)[:1], train.dataset_names, step=state.step)

    def _train_step(self, state: TrainState) -> TrainState:
        """One optimizer step and its line in the log; after a bad step, whatever resilience.on_bad_step says."""
        state = state.past_the_passed_over()
        samples = self.train.batch_size_after(state.consumed_samples)
        started = time.perf_counter()
        microbatches = self.data.train.microbatches(state.consumed_samples)
        loaded = time.perf_counter()
        self.optimizer.zero_grad()
        losses = self.runner.run(microbatches, self.data.train.dataset_names, step=state.step)
        grad_norm = self.optimizer.gradient_norm()
        fault = fault_of((losses["loss"], grad_norm), state.measured, self.resilience)
        if fault is not None and (elsewhere := self._after_bad_step(state, fault)) is not None:
            return elsewhere
        group_norms = self.optimizer.groups.norms()
        learning_rate = self.optimizer.learning_rate(state.step + 1)
        if fault is None:
            self.optimizer.apply(state.step + 1, grad_norm)
            state = state.remember(remembered(state.measured, (losses["loss"], grad_norm), self.resilience))
        synchronize(self.topology.device)
        seconds = time.perf_counter() - started
        blend = self.data.train.progress(state.consumed_samples + samples)
        state = state.advance(samples, self.train.seq_length, blend)
        self.run.log_metrics(
            {
                "step": state.step,
                **losses,
                "grad_norm": grad_norm,
                **{f"grad_norm/{group}": norm for group, norm in group_norms.items()},
                "learning_rate": learning_rate,
                **({"skipped": 1} if fault is not None else {}),
                "global_batch_size": samples,
                "consumed_samples": state.consumed_samples,
                "consumed_tokens": state.consumed_tokens,
                "timing": {
                    "tokens_per_second": samples * self.train.seq_length / seconds,
                    "step_seconds": seconds,
                    "data_seconds": loaded - started,
                    "peak_memory_gib": peak_memory_bytes(self.topology.device) / 2**30,
                },
            }
        )
        self._time_ranks(state.step, loaded - started, self.runner.computed_at - loaded)
        return state

    def _after_bad_step(self, state: TrainState, fault: str) -> TrainState | None:
        """Write a bad step down, on every rank alike. Its state to go on from where the run is rewound; None where the
        step is skipped."""
        self._watchdog.alive(f"what follows bad step {state.step + 1}")
        self._bad_steps += 1
        action, number = self.resilience.on_bad_step, state.step + 1
        first_sample = state.consumed_samples
        last_sample = first_sample + self.train.batch_size_after(first_sample)
        where = self._where_not_finite(state)
        documents = sorted({key for window in self.data.train.keys(first_sample) for key in window})
        self.run.log_event(
            "bad_step", step=number, fault=fault, where=where, action=action, samples=[first_sample, last_sample],
            documents=documents,
        )  # fmt: skip
        if action == "stop" or self._bad_steps > self.resilience.max_bad_steps:
            self._finish_save()
            limit = "" if action == "stop" else f" after {self._bad_steps - 1} others, resilience.max_bad_steps"
            raise InputError(
                f"step {number} has {fault}{limit}; {where}: nothing was saved since the last checkpoint; lower "
                f"optim.lr, look at the data (tools/inspect_data.py --step {number}), or set resilience.on_bad_step"
            )
        self.run.console.print(f"step {number} has {fault}: {action}; {where}", markup=False, soft_wrap=True)
        return self._rewind(state, last_sample) if action == "rewind" else None

    def _rewind(self, state: TrainState, end: int) -> TrainState:
        """The state of the last checkpoint, which from now on passes over the batches before sample `end`."""
        self._finish_save()
        self._watchdog.alive("the way back to the last checkpoint")
        saved = self.checkpoint.load_latest()
        if saved is None:
            raise InputError(
                f"step {state.step + 1} is bad and there is no checkpoint to rewind to: set resilience.on_bad_step to "
                "skip, or save earlier (checkpoint.save_interval)"
            )
        begin = end - self.resilience.pass_over_batches * self.train.batch_size_after(state.consumed_samples)
        rewound = state.rewind(TrainState.from_dict(saved), begin, end)
        self.run.forget_after(rewound.step)
        self.run.log_event("rewind", step=rewound.step, passed_over=[list(pair) for pair in rewound.passed_over])
        return rewound

    def _check_replicas(self, step: int) -> None:
        """Raise InputError where ranks that hold the same weights do not, any more."""
        interval = self.resilience.replica_check_interval
        if not interval or step % interval:
            return
        self.optimizer.gather_weights()
        found = differing_replicas(self.optimizer.model.module, self.topology)
        if self.resilience.check_optimizer:
            found += unlike_masters(self.optimizer, self.topology)
        if found:
            self._finish_save()
            self.run.log_event("divergence", step=step, found=found)
            raise InputError(
                f"after step {step} replicas of the weights differ: {first(found)}: a device, its memory or a link is "
                "at fault; the last checkpoint may hold it too (tools/verify_checkpoint.py); start again without the "
                "node"
            )

    def _time_ranks(self, step: int, data_seconds: float, compute_seconds: float) -> None:
        interval = self.resilience.rank_times_interval
        if not interval or step % interval:
            return
        told = rank_times(data_seconds, compute_seconds, self.topology)
        if told is not None:
            self.run.log_event("rank_times", step=step, **told)
            if line := line_about(told):
                self.run.console.print(f"step {step}: {line}", markup=False, soft_wrap=True)

    def _tell_of_hang(self, activity: str, seconds: float) -> None:
        self.run.log_event("hang", activity=activity, seconds=round(seconds, 1))

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
        self._watchdog.alive("an evaluation", more_s=self.train.eval_steps * self._watchdog.step_seconds)
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
        self._finish_save()
        self._watchdog.alive(f"the save of step {state.step}", more_s=self.checkpoint.section.save_timeout_s)
        self.checkpoint.start_save(state.step, state.as_dict())

    def _save_last(self, state: TrainState) -> None:
        """Save the state reached, unless it is, and wait for it; with a second attempt where the first fails."""
        outcome = self._finish_save()
        for _ in range(LAST_ATTEMPTS):
            if self.checkpoint.saved_step != state.step:
                self._start_save(state)
                outcome = self._finish_save()
        if self.checkpoint.saved_step != state.step:
            raise InputError(
                f"step {state.step} could not be saved in {self.checkpoint.store.root} ({outcome.failure}): mend that "
                "(room, permissions, a device), and start the run again; it goes on from its last checkpoint"
            )

    def _finish_save(self) -> SaveOutcome | None:
        """Wait for the save that is being written, if one is, as long as it may take; log how it ended."""
        self._watchdog.alive("a wait for the last save", more_s=self.checkpoint.section.save_timeout_s)
        return self._report(self.checkpoint.finish())

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
