"""Precision auto in whole runs: what was chosen is told and kept, also where another CPU goes on."""

import json
from pathlib import Path

import pytest
import yaml

import pretrain_emu3
from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.observe.provenance import read_provenance
from tests.support.small_run import write_small_run
from tests.unit.tokenizer_vision.test_resume import arguments
from tokenizer_train.vision import train as tokenizer

LIMIT = "ONEDNN_MAX_CPU_ISA"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Starts of a decoder's training, one step each: (precision asked for) -> run folder."""
    folder = tmp_path_factory.mktemp("precision")
    write_small_run(folder)

    def start(precision: str) -> Path:
        options = ["--config", str(folder / "config.yaml"), "--observe.run_dir", str(folder / "run")]
        options += ["--runtime.device", "cpu", "--runtime.num_threads", "1", "--train.exit_interval", "1"]
        pretrain_emu3.train(load(RunConfig, [*options, "--runtime.precision", precision]))
        return folder / "run"

    return start


@pytest.fixture
def vision_tokenizer(tmp_path):
    def start(precision: str) -> Path:
        options = {"train__exit_interval": 1, "train__eval_interval": 0, "loss__adversarial": 0}
        tokenizer.main(arguments(tmp_path / "run", train__precision=precision, **options))
        return tmp_path / "run"

    return start


@pytest.mark.parametrize("program, section", [("decoder", "runtime"), ("vision_tokenizer", "train")])
def test_what_a_run_began_in_is_told_and_kept(request, monkeypatch, capsys, program, section):
    start = request.getfixturevalue(program)
    monkeypatch.setenv(LIMIT, "AVX2")
    run = start("auto")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("computing in fp32: this CPU ")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config[section]["precision"] == "fp32"
    told = read_provenance(run)[-1]["precision"]
    assert (told["asked"], told["name"]) == ("auto", "fp32") and told["reason"] in first
    monkeypatch.delenv(LIMIT)  # as on a CPU that multiplies bf16, where this one does
    start("auto")
    assert "computing in fp32: " in capsys.readouterr().out.splitlines()[0]
    assert [one["precision"]["name"] for one in read_provenance(run)] == ["fp32", "fp32"]
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [e["config"][section]["precision"] for e in starts if e["event"] == "start"] == ["fp32", "fp32"]
