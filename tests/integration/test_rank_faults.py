"""A fault under torchrun: one line by the lowest rank that saw it, and the end of all ranks."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.data import build_data
from megatron_ext.runtime.faults import SETTLE_S
from megatron_ext.vocab import Vocabulary
from tests.support.programs import Program
from tests.support.small_run import Place, write_small_run

PROGRAM = "pretrain_emu3.py"
DEADLINE_S = 60 - SETTLE_S
"""From the line to the end; the line comes at most SETTLE_S after the fault."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_small_run(folder)
    return folder


OF_OWN_CONFIGURATION = """
import os, sys, pretrain_emu3
sys.argv += ["--config", os.path.join(os.path.dirname(sys.argv[0]), os.environ["RANK"] + ".yaml")]
pretrain_emu3.cli()
"""


def torchrun(*command: str) -> list[str]:
    """What two ranks of a program print on stderr.

    Fails when they do not end, with an exit code other than 0, within DEADLINE_S of the first error line.
    """
    with Program("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command) as program:
        told = None
        while program.poll() is None:
            time.sleep(0.05)
            told = told or ("error: " in program.stderr and time.monotonic())
            assert not told or time.monotonic() - told < DEADLINE_S, program.stderr
        assert program.poll() != 0 and "error: " in program.stderr, program.stderr
        return program.stderr.splitlines()


def check_told_once(lines: list[str], *named: str) -> None:
    """One `error:` line that holds `named`, and no traceback of a rank before torchrun's own report."""
    [position] = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert all(name in lines[position] for name in named), lines[position]
    assert sum("Traceback" in line for line in lines) == 1, "\n".join(lines)
    assert "ChildFailedError" in "".join(lines)  # the one traceback is torchrun's


def test_a_fault_that_all_ranks_see(workplace):
    run = workplace / "all"
    options = ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(run)]
    lines = torchrun(PROGRAM, *options, "--optim.lrr", "1")
    check_told_once(lines, "'optim.lrr'", "did you mean 'optim.lr'?")
    assert not run.exists()


def test_a_fault_that_rank_1_sees_before_it_joins(workplace):
    """Rank 0 waits for it in the rendezvous."""
    own = workplace / "own"
    own.mkdir()
    (own / "0.yaml").write_text("{}\n")
    (own / "1.yaml").write_text(yaml.safe_dump({"vocab": {"text_tokenizer": "no/such.model"}}))
    (own / "program.py").write_text(OF_OWN_CONFIGURATION)
    options = ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(workplace / "early")]
    lines = torchrun(str(own / "program.py"), *options)
    check_told_once(lines, "no/such.model")
    assert not (workplace / "early").exists()


def test_a_fault_that_rank_1_sees_while_it_trains(workplace):
    """Rank 0 waits for it in a collective, and is told by torchrun to save and stop."""
    for path in workplace.glob("train.*"):
        target = workplace / f"damaged{path.name.removeprefix('train')}"
        shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
    options = ["--config", str(workplace / "config.yaml"), "--observe.run_dir", str(workplace / "late")]
    options += ["--data.train", f'[{{"prefix": "{workplace / "damaged"}"}}]']
    config = load(RunConfig, options)
    vocabulary = Vocabulary.load(config.vocab)
    loaders = [build_data(config.data, config.train, vocabulary, Place(rank)).train for rank in (0, 1)]
    before = [place for step in (0, 4, 8) for loader in loaders for places in loader.places(step) for place in places]
    [(_, window), *_] = [place for places in loaders[1].places(12) for place in places if place not in before]
    dataset = loaders[1].datasets[0]
    document = dataset.pieces(window)[0].document
    ids = np.memmap(f"{dataset.documents.prefix}.bin", dtype=np.int32, mode="r+")
    ids[int(dataset.documents.lengths[:document].sum()) + 1] = 10**6
    ids.flush()

    lines = torchrun(PROGRAM, *options)
    check_told_once(lines, "damaged.bin holds id 1000000", f"in document {document} (key/{document})")
    steps = (workplace / "late" / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 3 and not (workplace / "late" / "checkpoints" / "latest").exists()


def test_a_picture_that_one_rank_cannot_read(tmp_path):
    """The tokenizer's training: the other rank waits in the batch norms' exchange."""
    folder = tmp_path / "media"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(folder / f"{number}.png")
    damaged = folder / "6.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])  # the header is whole
    options = ["--config", "examples/movqgan_tiny_cpu.yaml", "--observe.run_dir", str(tmp_path / "run")]
    options += ["--media.inputs", f"[{folder}]", "--media.clip_share", "0", "--media.size", "16"]
    options += ["--model.ch_mult", "[1,1]", "--model.attn_resolutions", "[]"]
    lines = torchrun("-m", "tokenizer_train.vision.train", *options)
    check_told_once(lines, str(damaged), "media.max_bad_fraction 0.01")
    assert not (tmp_path / "run" / "tokenizer").exists()
