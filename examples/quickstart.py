"""The whole way on one machine, in the product's own programs: media, tokens, decoder, Hugging Face, pictures, report.

    python examples/quickstart.py      (or: make quickstart)

Every stage is a command line that is printed before it runs, so that it can be copied. Finished stages are recorded in
runs/quickstart/stages.json under a key of command, configuration and input files: run again, they are reused.
Interrupted, the run goes on where it stopped, because each program does.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from megatron_ext.config import InputError, load, run_program
from megatron_ext.config.section import Section
from megatron_ext.files import read_json_lines, replacing
from megatron_ext.observe.writers import duration

ROOT = Path("runs/quickstart")
PACE = ROOT / "pace.json"
GRACE_S = 60  # for an interrupted program to save what it has


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(Section):
    """Run the quickstart: train tokenizers and a tiny decoder on examples/media, export it, draw, write a report."""

    fresh: bool = False
    """Remove runs/quickstart first."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """The part of a training that a stage does."""

    config: str
    """File that says how many steps the training has."""

    run: str
    """Its run folder."""

    first: int = 0
    """Steps done before this part."""

    until: int | None = None
    """Step at which this part stops; empty for the last one."""

    @property
    def last(self) -> int:
        """Step that this part ends with."""
        return self.until or yaml.safe_load(Path(self.config).read_text())["train"]["train_steps"]

    @property
    def reached(self) -> int:
        """Step that the last start ended with."""
        ends = [event["step"] for event in read_json_lines(Path(self.run) / "events.jsonl") if event["event"] == "end"]
        return ends[-1] if ends else 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command line, and what decides whether its result can be reused."""

    name: str
    """Key in stages.json."""

    says: str
    """What it does, as printed."""

    command: tuple[str, ...]
    """Arguments; the configuration files among them are inputs."""

    inputs: tuple[str, ...] = ()
    """Glob patterns of further input files that no earlier stage makes."""

    outputs: tuple[str, ...] = ()
    """Files and folders it makes; removed before a run that differs from the recorded one."""

    starts: float = 1.0
    """What it takes beside training, in starts of a program."""

    training: Training | None = None
    """Steps that it does."""

    @property
    def missing(self) -> str | None:
        """What its program, which ended without an error, has left undone: it was told to stop, and did."""
        for output in self.outputs:
            if not Path(output).exists():
                return f"{output} is not there"
        if self.training and self.training.reached < self.training.last:
            return f"{self.training.run} is at step {self.training.reached} of {self.training.last}"
        return None


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast this machine is, as its first stage measured it."""

    start_s: float
    """Seconds that a program takes to start."""

    step_s: dict[str, float]
    """Seconds of a step, by the training's configuration file."""

    @classmethod
    def measured(cls) -> "Pace | None":
        """What examples/quickstart_pace.py wrote, once it has."""
        return cls(**json.loads(PACE.read_text())) if PACE.exists() else None

    def seconds(self, stages: Sequence[Stage]) -> float:
        """Wall-clock seconds that stages will take."""
        trainings = [stage.training for stage in stages if stage.training]
        steps = sum((part.last - part.first) * self.step_s[part.config] for part in trainings)
        return steps + self.start_s * sum(stage.starts for stage in stages)


PYTHON = os.path.relpath(sys.executable)
TORCHRUN = (PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2")
TOKENIZER_CONFIG = "examples/movqgan_tiny_cpu.yaml"
DECODER_CONFIG = "examples/tiny_cpu.yaml"
DECODER_RUN = f"{ROOT}/decoder"
DECODER = (
    *(*TORCHRUN, "pretrain_emu3.py", "--config", DECODER_CONFIG, "--observe.run_dir", DECODER_RUN),
    *("--train.micro_batch_size", "2"),
)
HALF_WAY = 500
"""Step at which the decoder changes its layout."""

MEDIA = "examples/media/**/*"
CODE = ("megatron_ext/**/*.py", "megatron_ext/**/*.cpp", "tokenizer_train/**/*.py", "tools/*.py")
CAPTION = "A tabby cat looks into the camera."

STAGES = (
    Stage(
        name="pace",
        says="time a few steps of both trainings on this machine",
        command=(
            *(*TORCHRUN, "examples/quickstart_pace.py", "--tokenizer", TOKENIZER_CONFIG, "--decoder", DECODER_CONFIG),
            *("--output", str(PACE)),
        ),
        inputs=(MEDIA, *CODE),  # keys are chained: a change of the code runs everything again
        outputs=(str(PACE),),
    ),
    Stage(
        name="text_tokenizer",
        says="train a SentencePiece tokenizer on captions and prose",
        command=(PYTHON, "-m", "tokenizer_train.text.train", "--config", "examples/text_tokenizer_tiny.yaml"),
        outputs=(f"{ROOT}/text_tokenizer.model",),
    ),
    Stage(
        name="vision_tokenizer",
        says="train a tiny 3D MoVQGAN on pictures and clips: 48x48 pixels become 12x12 codes out of 512",
        command=(PYTHON, "-m", "tokenizer_train.vision.train", "--config", TOKENIZER_CONFIG),
        training=Training(config=TOKENIZER_CONFIG, run=f"{ROOT}/vision_tokenizer"),
        outputs=(f"{ROOT}/vision_tokenizer", f"{ROOT}/vision_tokenizer/tokenizer"),  # there once it is finished
    ),
    Stage(
        name="codes",
        says="turn pictures and clips into visual codes",
        command=(PYTHON, "tools/tokenize_vision.py", "--config", "examples/tokenize_tiny.yaml"),
        outputs=(f"{ROOT}/codes",),
    ),
    Stage(
        name="media_documents",
        says="write captions and codes as documents of an indexed dataset; a tenth of the sources is held out",
        command=(PYTHON, "tools/preprocess_data.py", "--config", "examples/preprocess_tiny.yaml"),
        outputs=(f"{ROOT}/data/media_train.manifest.json", f"{ROOT}/data/media_valid.manifest.json"),
    ),
    Stage(
        name="prose_documents",
        says="write the prose as another",
        command=(PYTHON, "tools/preprocess_data.py", "--config", "examples/preprocess_prose_tiny.yaml"),
        outputs=(f"{ROOT}/data/prose_train.manifest.json", f"{ROOT}/data/prose_valid.manifest.json"),
    ),
    Stage(
        name="inspect",
        says="report what was written, how it packs, and that every document is one",
        command=(PYTHON, "tools/inspect_data.py", "--config", "examples/inspect_tiny.yaml"),
    ),
    Stage(
        name="decoder_tensor_parallel",
        says="pretrain a decoder on two ranks, tensor parallel with sequence parallel; stop half way",
        command=(
            *DECODER,
            *("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"),
            *("--train.exit_interval", str(HALF_WAY)),
        ),
        training=Training(config=DECODER_CONFIG, run=DECODER_RUN, until=HALF_WAY),
        outputs=(DECODER_RUN,),
    ),
    Stage(
        name="decoder_context_parallel",
        says="resume the same run with context parallel: the loss goes on where it stopped",
        command=(*DECODER, "--parallel.context_parallel_size", "2"),
        training=Training(config=DECODER_CONFIG, run=DECODER_RUN, first=HALF_WAY),
    ),
    Stage(
        name="export",
        says="export decoder and vision tokenizer to a Hugging Face folder",
        command=(
            *(PYTHON, "tools/convert_checkpoint.py", "to-hf", "--checkpoint", DECODER_RUN),
            *("--vision_tokenizer", f"{ROOT}/vision_tokenizer/tokenizer", "--output", f"{ROOT}/hf"),
        ),
        outputs=(f"{ROOT}/hf",),
    ),
    Stage(
        name="transformers",
        says="load the folder in plain transformers, draw a picture for a caption and caption it",
        command=(PYTHON, "examples/plain_transformers.py", f"{ROOT}/hf", CAPTION, f"{ROOT}/transformers.png"),
        outputs=(f"{ROOT}/transformers.png",),
    ),
    Stage(
        name="draw",
        says="draw a picture for every caption",
        command=(PYTHON, "tools/generate.py", "--config", "examples/draw_tiny.yaml"),
        outputs=(f"{ROOT}/drawn",),
    ),
    Stage(
        name="caption",
        says="caption every picture",
        command=(PYTHON, "tools/generate.py", "--config", "examples/caption_tiny.yaml"),
        outputs=(f"{ROOT}/captioned",),
    ),
    Stage(
        name="report",
        says="write the report",
        command=(PYTHON, "examples/quickstart_report.py", "--run", str(ROOT)),
        outputs=(f"{ROOT}/report.html",),
    ),
)


class Ledger:
    """stages.json: name -> {key, finished, seconds}; a stage is recorded when it starts and when it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records = json.loads(path.read_text()) if path.exists() else {}

    def finished_seconds(self, stage: Stage, key: str) -> float | None:
        """How long the stage took, if it is finished under this key and its outputs are still there."""
        record = self._records.get(stage.name)
        if not record or record["key"] != key or not record["finished"]:
            return None
        return record["seconds"] if all(Path(output).exists() for output in stage.outputs) else None

    def start(self, stage: Stage, key: str) -> None:
        """Record the start. What a run under another key left is removed; what this one left, it goes on from."""
        if self._records.get(stage.name, {}).get("key") != key:
            for output in map(Path, stage.outputs):
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
            self._records[stage.name] = {"key": key, "finished": False, "seconds": 0.0}
            self._save()

    def stop(self, stage: Stage, seconds: float, *, finished: bool) -> None:
        """Record the end; an interrupted stage's seconds add up."""
        record = self._records[stage.name]
        record["seconds"] = round(record["seconds"] + seconds, 1)
        record["finished"] = finished
        self._save()

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(self._records, indent=1))


def key_of(stage: Stage, previous_key: str) -> str:
    """Hash of all that shapes the stage's result: the stages before it, its command, its configurations and inputs."""
    files = {Path(part) for part in stage.command if part.endswith(".yaml")}
    files |= {path for pattern in stage.inputs for path in Path().glob(pattern) if path.is_file()}
    digest = hashlib.sha256(previous_key.encode())
    digest.update(json.dumps(stage.command[1:]).encode())
    for path in sorted(files):
        digest.update(f"{path}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


def run_command(command: tuple[str, ...]) -> int:
    """Run it with this terminal; its exit code. Interrupted, it gets a chance to save before this raises."""
    has_workers = "torch.distributed.run" in command
    environment = dict(os.environ)
    if has_workers:  # what torchrun would choose, with three lines of warning
        environment.setdefault("OMP_NUM_THREADS", "1")
    # Its own session: Ctrl-C then reaches it once, from here.
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_hear_interrupts)
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("\ninterrupted: waiting for the program to save and stop (Ctrl-C again ends it at once)", flush=True)
        # Told to its workers, torchrun ends when they have; told to itself, it would end with a traceback.
        receivers = psutil.Process(process.pid).children() if has_workers else [process]
        for receiver in receivers:
            receiver.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE_S)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise


def _hear_interrupts() -> None:
    """In a program about to start: a job in the background inherits a SIGINT that is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_stages(stages: tuple[Stage, ...], ledger: Ledger) -> None:
    """Run what is not finished.

    Raises:
        InputError: a stage failed, or was stopped before its end.
    """
    began, key = time.monotonic(), ""
    for number, stage in enumerate(stages, 1):
        key = key_of(stage, key)
        label = f"[{number}/{len(stages)}]"
        seconds = ledger.finished_seconds(stage, key)
        if seconds is not None:
            print(f"{label} {stage.says}: reused, it took {duration(seconds)}", flush=True)
            continue
        ledger.start(stage, key)
        print(f"\n{label} {stage.says}{about((stage,))}\n$ {shlex.join(stage.command)}", flush=True)
        stage_began, code, missing = time.monotonic(), None, None
        try:
            code = run_command(stage.command)
            missing = stage.missing
        finally:
            ledger.stop(stage, time.monotonic() - stage_began, finished=code == 0 and missing is None)
        if code:
            raise InputError(f"stage {stage.name} ended with exit code {code}: see above; run again to go on from here")
        if missing:
            raise InputError(f"stage {stage.name} was stopped before its end, {missing}: run again to go on from here")
        took, total = duration(time.monotonic() - stage_began), duration(time.monotonic() - began)
        to_go = about(stages[number:], " to go") if stages[number:] else ""
        print(f"{label} done in {took}; {total} so far{to_go}", flush=True)


def about(stages: Sequence[Stage], what: str = "") -> str:
    """How long stages will take on this machine, in brackets; nothing before that was measured."""
    pace = Pace.measured()
    return f" (about {duration(pace.seconds(stages))}{what})" if pace else ""


def main(argv: list[str]) -> None:
    """Run the quickstart."""
    config = load(QuickstartConfig, argv, prog="quickstart.py")
    if not Path("examples/tiny_cpu.yaml").exists():
        raise InputError(f"{Path.cwd()} is not the project's folder: run `python examples/quickstart.py` from there")
    if config.fresh:
        shutil.rmtree(ROOT, ignore_errors=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: the program that runs must not be left behind
        signal.signal(number, signal.default_int_handler)
    run_stages(STAGES, Ledger(ROOT / "stages.json"))
    print(f"\nthe report: {(ROOT / 'report.html').resolve()}")
    print(f"the curves: {PYTHON} -m tensorboard.main --logdir {ROOT}/decoder/tensorboard")


if __name__ == "__main__":
    run_program(main)
