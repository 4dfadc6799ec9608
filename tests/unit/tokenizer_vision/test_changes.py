"""What a started-again run may change: steering is told, free fields are not, all else is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import InputError, as_dict, load
from tokenizer_train.vision.changes import changes
from tokenizer_train.vision.config import VisionTokenizerTrainingConfig

EXAMPLE = Path(__file__).parents[3] / "examples/movqgan_tiny_cpu.yaml"


def configured(**options: object) -> VisionTokenizerTrainingConfig:
    given = [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
    return load(VisionTokenizerTrainingConfig, [f"--config={EXAMPLE}", *given])


def changed(**options: object) -> dict:
    return changes(as_dict(configured()), configured(**options), Path("step_00000100"))


def test_nothing_has_changed():
    assert changed() == {}


def test_a_training_that_diverged_is_steered():
    found = changed(optim__lr=1e-4, discriminator__optim__lr=2e-5, optim__clip_grad=0.5, optim__lr_decay_steps=5000)
    before = configured()
    assert found == {
        "optim.lr": (before.optim.lr, 1e-4),
        "discriminator.optim.lr": (before.discriminator.optim.lr, 2e-5),
        "optim.clip_grad": (before.optim.clip_grad, 0.5),
        "optim.lr_decay_steps": (before.optim.lr_decay_steps, 5000),
    }


@pytest.mark.parametrize(
    "options",
    [
        {"media__max_bad_fraction": 0.5, "media__workers": 1, "media__prefetch_batches": 1},
        {"media__cache_megabytes": 0, "media__index_dir": "index", "train__num_threads": 7, "train__eval_interval": 1},
        {"checkpoint__keep": 5, "observe__run_dir": "elsewhere", "observe__log_interval": 3},
        {"train__train_steps": 9000, "optim__lr_decay_steps": 900},
    ],
)
def test_what_computes_nothing_is_free(options):
    assert set(changed(**options)) <= {"optim.lr_decay_steps"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"train__train_steps": 9000}, "train.train_steps = 9000, but step_00000100 was made with 900"),
        ({"optim__weight_decay": 0.5}, "optim.weight_decay = 0.5, but"),
        ({"discriminator__optim__adam_beta2": 0.5}, "discriminator.optim.adam_beta2 = 0.5, but"),
        ({"media__size": 128}, "media.size = 128, but"),
        ({"loss__l1": 0.25}, "loss.l1 = 0.25, but"),
    ],
)
def test_what_is_computed_must_stay(options, told):
    with pytest.raises(InputError, match=f"^{told}.*set it back, or choose another observe.run_dir$"):
        changed(**options)


def test_fields_newer_than_the_run_acted_with_their_defaults():
    before, config = as_dict(configured()), configured(optim__optimizer="adam")
    del before["optim"]["optimizer"], before["discriminator"]["optim"]["optimizer"], before["media"]["loader"]
    assert changes(before, config, Path("step_00000100")) == {}
    muon = replace(config, optim=replace(config.optim, optimizer="muon"))
    with pytest.raises(InputError, match="optim.optimizer = 'muon', but step_00000100 was made with 'adam'"):
        changes(before, muon, Path("step_00000100"))
