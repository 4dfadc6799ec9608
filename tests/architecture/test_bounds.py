"""Every number and name of every configuration has a bound in its type, or is listed here as free."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from megatron_ext.config.section import Section
from tests.architecture.source import ROOT
from tests.architecture.test_config import OPTION_CLASSES

FREE = {
    "EndConfig.exit_code": "whatever the programs ended with",
    "VideoFiltersConfig.min_aesthetic": "scores of any sign",
    "PictureFiltersConfig.min_aesthetic": "scores of any sign",
    "GenerateConfig.negative_prompt": "may be empty",
    "GenerateConfig.caption": "may be empty: a picture without a caption",
    "ShownConfig.picture_prompt": "may be empty: the model then speaks unasked",
    "ShownConfig.clip_prompt": "as picture_prompt",
    "ServerConfig.base_url": "checked for its beginning",
    "EncodingConfig.preset": "checked against libx264's",
    "PreprocessConfig.before_templates": "checked for their places",
    "PreprocessConfig.after_templates": "as before_templates",
    "PreprocessConfig.understanding_templates": "as before_templates",
    "PreprocessConfig.next_turn_template": "as before_templates",
    "PreflightConfig.nodes": "empty: not known",
    "CheckConfig.queue": "empty: no options",
    "EndConfig.state": "empty where Slurm does not answer",
}
"""Class and field -> why any value will do, or what else looks at it."""


def classes() -> list[type]:
    """Every `...Config` of the project, imported."""
    found = []
    for path, node in OPTION_CLASSES:
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        found.append(getattr(module, node.name))
    return found


def unbounded(hint: Any) -> Iterator[type]:
    """Numbers and strings in a type that no bound belongs to."""
    if hint in (int, float, str):
        yield hint
    elif typing.get_origin(hint) not in (Annotated, typing.Literal):
        for inner in typing.get_args(hint):
            yield from unbounded(inner)


@pytest.mark.parametrize("config", classes(), ids=lambda config: config.__name__)
def test_every_option_has_its_bound(config):
    assert issubclass(config, Section)
    hints = typing.get_type_hints(config, include_extras=True)
    own = [field.name for field in dataclasses.fields(config) if field.name in config.__annotations__]
    free = {f"{config.__name__}.{name}" for name in own if list(unbounded(hints[name]))}
    assert free <= FREE.keys(), f"give these a type of config/section.py, or list them: {sorted(free - FREE.keys())}"


def test_what_is_listed_is_free():
    fields = {f"{config.__name__}.{name}" for config in classes() for name in config.__annotations__}
    assert FREE.keys() <= fields
