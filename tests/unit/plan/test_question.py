"""What belongs to the plan is taken from the command line; the rest is left as it was."""

import pytest

from megatron_ext.config import InputError
from megatron_ext.plan import Question, take_question

REST = ["--config", "a.yaml", "--train.seq_length", "64", "--tokens_of_mine=3"]


def test_no_question():
    assert take_question(REST) == (None, REST)


def test_defaults(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    question, rest = take_question([*REST, "--dry_run"])
    assert rest == REST
    assert question == Question(world_size=6, suggest=False, tokens=None, mfu=0.4, memory_gib=80, peak_tflops=989.4)


def test_all_options_between_the_others():
    asked = "--suggest --world_size 16 --tokens 1e12 --mfu 0.5 --memory_gib 141 --peak_tflops 1979".split()
    question, rest = take_question(REST[:2] + asked + REST[2:])
    assert rest == REST
    assert question == Question(world_size=16, suggest=True, tokens=1e12, mfu=0.5, memory_gib=141, peak_tflops=1979)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--world_size", "8"], "--world_size belongs to --dry_run or --suggest"),
        (["--dry_run", "--world_size", "0"], "--world_size 0"),
        (["--dry_run", "--world_size", "-8"], "--world_size -8"),
        (["--dry_run", "--world_size", "many"], "--world_size: invalid int value: 'many'"),
        (["--dry_run", "--world_size"], "--world_size: expected one argument"),
        (["--dry_run", "--mfu", "40"], "--mfu 40"),
        (["--dry_run", "--mfu", "nan"], "--mfu nan"),
        (["--dry_run", "--tokens", "0"], "--tokens 0"),
        (["--suggest", "--memory_gib", "0"], "--memory_gib 0"),
        (["--suggest", "--peak_tflops", "-1"], "--peak_tflops -1"),
    ],
)
def test_one_line_names_the_fault(arguments, named):
    with pytest.raises(InputError) as error:
        take_question(arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
