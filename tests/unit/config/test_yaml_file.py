"""YAML that cannot be meant so: one line with the file, the line and the field."""

import pytest

from megatron_ext.config import InputError, load
from megatron_ext.config.run import RunConfig

REQUIRED = ["--train.train_steps", "3", "--observe.run_dir", "runs/x"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optim: {lr: 1e-3}\nmodel: {}\noptim: {min_lr: 0}\n", ":3 has optim twice, first in line 1: "),
        ("optim:\n  lr: 1e-3\n  lr: 1e-4\n", ":3 has optim.lr twice, first in line 2: "),
        ("data:\n  train:\n  - prefix: a\n    prefix: b\n", ":4 has data.train[0].prefix twice, first in line 3: "),
        ("model: {}\noptim:\n", ":2 optim is empty: "),
        ("optim: null\n", ":1 optim is empty: "),
        ("data:\n  train:\n  -\n", ":3 data.train[0] is empty: "),
        ("optim: 3\n", ":1 optim is '3': "),
        ("optim: [{lr: 1}]\n", ":1 optim is a list: "),
        ("data: {train: [a]}\n", ":1 data.train[0] is 'a': "),
        ("optim: {on: 1}\n", ":1 has a key on in optim, which is no name: "),
        ("7: 1\n", ":1 has a key 7 in it, which is no name: "),
        ("", " is empty: "),
        ("# only a comment\n\n", " is empty: "),
        ("---\n", ":2 the file is empty: "),
        ("- a\n", ":1 the file is a list: "),
        ("optim\n", ":1 the file is 'optim': "),
        ("optim: {lr: 1e-3\n", ":2 is no YAML: "),
    ],
)
@pytest.mark.parametrize("how", ["--config FILE", "--config=FILE"])
def test_a_broken_file(tmp_path, text, told, how):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load(RunConfig, [*REQUIRED, *how.replace("FILE", str(path)).split()])
    assert str(error.value).startswith(f"{path}{told}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"optim: {lr: \xff}\n", b"\x00"])
def test_bytes_that_are_no_text(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.yaml is no YAML in UTF-8: "):
        load(RunConfig, [*REQUIRED, "--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--optim", '{"lr": 1, "lr": 2}', "--optim:1 has optim.lr twice, "),
        ("--data.train", '[{"prefix": "a", "prefix": "b"}]', "--data.train:1 has data.train[0].prefix twice, "),
        ("--data.train", "[3]", "--data.train:1 data.train[0] is '3': "),
    ],
)
def test_a_broken_value_on_the_command_line(option, value, told):
    for words in ([option, value], [f"{option}={value}"]):
        with pytest.raises(InputError) as error:
            load(RunConfig, [*REQUIRED, *words])
        assert str(error.value).startswith(told)


def test_what_is_meant_is_taken(tmp_path):
    """Equal keys in different places, empty maps and lists, a byte order mark, anchors, keys that look like others."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "\ufeffmodel: {}\ndata:\n  train: [{prefix: a}, {prefix: b}]\n  valid: []\n"
        "optim: &slow {lr: 1e-3}\ncheckpoint: {keep_every: null}\n",
        encoding="utf-8",
    )
    config = load(RunConfig, [*REQUIRED, "--config", str(path)])
    assert [dataset.prefix for dataset in config.data.train] == ["a", "b"] and config.optim.lr == 1e-3
