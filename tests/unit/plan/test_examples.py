"""Every shipped configuration of a decoder, planned on the ranks that its opening comment starts."""

from pathlib import Path

import pytest

from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.plan.job import USABLE_SHARE, plan_job
from megatron_ext.plan.question import take_question
from tests.support.documented import opening_commands, started_run
from tests.support.small_models import CORPUS
from tokenizer_train.text.train import TextTokenizerTrainConfig, train_model

ROOT = Path(__file__).parents[3]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.read_text().startswith("#")]
COMMANDS = {path: opening_commands(path.read_text(encoding="utf-8")) for path in EXAMPLES}
DECODERS = [path for path, commands in COMMANDS.items() if any(started_run(command) for command in commands)]


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory):
    """The quickstart makes its own; any model plans as well."""
    path = tmp_path_factory.mktemp("vocab") / "text_tokenizer.model"
    path.write_bytes(train_model(CORPUS * 4, TextTokenizerTrainConfig(input=("x",), output="x", vocab_size=440)))
    return path


def test_the_real_sizes_are_shipped():
    assert {"emu3_8b_stage1", "emu3_8b_stage2", "emu3_5_34b", "tiny_cpu"} <= {path.stem for path in DECODERS}


@pytest.mark.parametrize("example", DECODERS, ids=lambda path: path.stem)
def test_shipped_configuration_starts_and_fits(example, text_tokenizer, monkeypatch):
    monkeypatch.chdir(ROOT)
    [(ranks, arguments)] = [run for command in COMMANDS[example] if (run := started_run(command))]
    planned = [command[2:] for command in COMMANDS[example] if command[:2] == ["python", "pretrain_emu3.py"]]
    for command in (*planned, ["--dry_run", "--world_size", str(ranks), *arguments]):
        question, rest = take_question(command)
        assert question.world_size == ranks
        config = load(RunConfig, rest)
        if config.vocab.layout == "custom":
            config = load(RunConfig, [*rest, "--vocab.text_tokenizer", str(text_tokenizer)])
        plan = plan_job(config, question)
        assert not plan.faults
        assert plan.memory.peak < USABLE_SHARE * question.memory_gib * 2**30


def test_what_the_papers_publish():
    """Facts of the papers, beside the fields that hold them: a typing error must not pass."""
    stage1, stage2, emu3_5 = (
        load(RunConfig, ["--config", str(ROOT / "examples" / f"{name}.yaml")])
        for name in ("emu3_8b_stage1", "emu3_8b_stage2", "emu3_5_34b")
    )
    assert (stage1.train.seq_length, stage2.train.seq_length, emu3_5.train.seq_length) == (5120, 131_072, 32_768)
    for config in (stage1, stage2):
        optim = config.optim
        assert (optim.lr, optim.lr_decay_style, optim.min_lr, optim.lr_decay_steps) == (5e-5, "cosine", 0.0, None)
        assert config.objective.vision_loss_weight == 0.5
    assert stage2.checkpoint.init_from == stage1.observe.run_dir
    train = emu3_5.train
    assert 10.2e12 < train.train_steps * train.global_batch_size * train.seq_length < 10.4e12  # "10.3T"
