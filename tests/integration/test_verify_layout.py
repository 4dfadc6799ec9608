"""tools/verify_layout.py as a user runs it: a verdict for a layout that agrees, and for one with a planted bug."""

from pathlib import Path

import pytest
import yaml

from tests.support.programs import Finished, run
from tests.unit.data.samples import train_text_tokenizer

TP2_SP = ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true")
CP2 = ("--parallel.context_parallel_size", "2")

# As if the norms were not marked: under sequence parallelism each tensor rank keeps the gradient of its own tokens.
UNMARKED_NORMS = """
import sys
from megatron_ext.config import run_program
from megatron_ext.model import specs
from emu3_tools.verify_layout import main

build = specs.SequenceParallelRMSNorm.__init__

def build_unmarked(self, config, *args, **kwargs):
    build(self, config, *args, **kwargs)
    self.weight.sequence_parallel = False

specs.SequenceParallelRMSNorm.__init__ = build_unmarked
run_program(main)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    (folder / "text.model").write_bytes(train_text_tokenizer())
    (folder / "unmarked_norms.py").write_text(UNMARKED_NORMS)
    sections = {
        "runtime": {"device": "cpu"},
        "vocab": {"layout": "custom", "text_tokenizer": str(folder / "text.model"), "codebook_size": 50},
        "train": {"seq_length": 1024, "global_batch_size": 8, "train_steps": 1000},
        "data": {"train": [{"prefix": "is/not/read"}], "document_alignment": 8},
        "observe": {"run_dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder / "config.yaml"


def verify(config: Path, *arguments: str, ranks: int, program: str = "tools/verify_layout.py") -> Finished:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return run(*torchrun, program, "--config", str(config), *arguments)


def test_a_layout_that_agrees_is_verified(config, monkeypatch):
    """In what auto becomes, the same for the process alone and for the layout."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    result = verify(config, *CP2, "--runtime.precision", "auto", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "layout   context_parallel_size 2; fp32 on cpu" in result.stdout
    assert "grad_norm" in result.stdout and "DIFFERS" not in result.stdout
    assert result.stdout.splitlines()[-1] == "verified: this layout trains as one process does"
    assert result.stdout.count("verified") == 1, "one rank speaks"


def test_a_planted_bug_is_named(config):
    result = verify(config, *TP2_SP, ranks=2, program=str(config.parent / "unmarked_norms.py"))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: this layout does not train as one process does: "), errors
    differs = [line.split()[0] for line in result.stdout.splitlines() if line.endswith("DIFFERS")]
    assert {"grad_norm", "weights", "replicas"} <= set(differs)
    assert "norm.weight" in next(line for line in result.stdout.splitlines() if line.startswith("weights"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", "0"), "steps 0"),
        (("--parallel.context_parallel_size", "2"), "context_parallel_size 2"),
        (("--train.global_batch_sise", "2"), "did you mean 'train.global_batch_size'"),
    ],
)
def test_bad_input_is_one_line(config, arguments, named):
    result = verify(config, *arguments, ranks=1)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and named in result.stderr.splitlines()[-1]
