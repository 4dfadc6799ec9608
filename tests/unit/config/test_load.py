"""Configuration: precedence, errors in one line, and a YAML round trip."""

import dataclasses

import pytest

from megatron_ext.config import InputError, load, to_yaml
from megatron_ext.config.optim import OptimConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.section import Section

REQUIRED = ["--train.train_steps", "3", "--observe.run_dir", "runs/x"]


def test_defaults_then_files_left_to_right_then_command_line(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim: {lr: 1e-3, weight_decay: 0.3}\ndata: {train: [{prefix: a}, {prefix: b, weight: 2}]}\n")
    second.write_text("optim: {lr: 2e-3}\n")
    config = load(RunConfig, [*REQUIRED, "--config", str(first), "--config", str(second), "--optim.min_lr", "1e-5"])
    assert (config.optim.lr, config.optim.weight_decay, config.optim.min_lr, config.optim.clip_grad) == (
        2e-3,
        0.3,
        1e-5,
        1.0,
    )
    assert [(dataset.prefix, dataset.weight) for dataset in config.data.train] == [("a", 1.0), ("b", 2.0)]


def test_yaml_round_trip(tmp_path):
    config = load(
        RunConfig, [*REQUIRED, "--data.train", '[{"prefix": "a", "weight": 0.25}]', "--model.num_layers", "3"]
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(RunConfig, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--optim.weight_deacy", "1"], "'optim.weight_decay'"),
        (["--train.trainsteps", "1"], "'train.train_steps'"),
        (["--optim.lr", "fast"], "fast"),
        (["--data.train", '[{"prefx": "a"}]'], "'data.train.prefix'"),
        (["--config", "no/such.yaml"], "no/such.yaml"),
        (["--model.preset", "emu4"], "emu4"),
        (["--parallel.pipeline_model_parallel_size", "2"], "tensor x context x data parallel"),
        (["--model.num_moe_experts", "8"], "Emu3 is dense"),
        (["--model.mtp_num_layers", "1"], "one next token"),
        (["--model.tie_word_embeddings", "true"], "two matrices"),
    ],
)
def test_a_fault_is_one_line_that_names_it(arguments, named):
    with pytest.raises(InputError) as error:
        load(RunConfig, [*REQUIRED, *arguments])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_required_field_is_named():
    with pytest.raises(InputError, match=r"train\.train_steps"):
        load(RunConfig, ["--observe.run_dir", "runs/x"])


def test_sections_are_frozen():
    config = load(RunConfig, REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0


def test_the_faults_of_all_sections_are_told_at_once():
    """Under the names that they have here: a section in a list, and one below another that is used elsewhere too."""
    with pytest.raises(InputError) as error:
        load(
            RunConfig,
            [
                *REQUIRED,
                "--optim.lr",
                "-1",
                "--train.seq_length",
                "0",
                "--data.train",
                '[{"prefix": "a", "weight": 0}]',
            ],
        )
    assert str(error.value) == (
        "optim.lr -1.0: must be at least 0; train.seq_length 0: must be at least 1; "
        "data.train[0]: weight 0.0: must be above 0"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Section):
    """A section that holds another one under a name of its own."""

    second: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Not called optim."""


def test_a_section_is_named_as_it_is_here():
    with pytest.raises(InputError, match=r"^second\.lr -1\.0: must be at least 0; second\.clip_grad -1\.0: "):
        load(Outer, ["--second.lr", "-1", "--second.clip_grad", "-1"])
    with pytest.raises(InputError, match=r"^second\.min_lr 1\.0 is above second\.lr 5e-05: "):
        load(Outer, ["--second.min_lr", "1"])


def test_null_where_a_value_must_be(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {lr: }\ndata: {train: }\n")
    with pytest.raises(InputError, match=r"^optim\.lr null: must be given; data\.train null: must be given$"):
        load(RunConfig, [*REQUIRED, "--config", str(tmp_path / "run.yaml")])


def test_what_is_printed_is_valid_too(capsys):
    with pytest.raises(InputError, match=r"^optim\.lr -1\.0: "):
        load(RunConfig, [*REQUIRED, "--optim.lr", "-1", "--print_config"])
    with pytest.raises(SystemExit):  # a template may lack what is required
        load(RunConfig, ["--print_config"])
    assert "train_steps: null" in capsys.readouterr().out
