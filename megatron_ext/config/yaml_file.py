"""What is wrong in YAML before its values are looked at: told with the file, the line and the field.

The parser of options would take the last of two equal keys, pass over a section that is no section, and would not say
which file it means.
"""

import dataclasses
import itertools
import os
import re
import typing
from collections.abc import Iterator, Sequence

import yaml

from megatron_ext.config.errors import InputError


def refuse_broken_yaml(config_type: type, argv: Sequence[str]) -> None:
    """Raise InputError for the first file of `--config FILE`, or value on the command line, that cannot be meant so."""
    for option, value in _options(argv):
        if option == "config" and os.path.isfile(value):
            _refuse(_read(value), config_type, value, "")
        elif value[:1] in ("{", "["):
            try:
                node = yaml.compose(value, Loader=yaml.SafeLoader)
            except yaml.YAMLError:
                continue  # the parser says what it expects there
            _refuse(node, _type_of(config_type, option), f"--{option}", option)


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of the options, given as `--name value` or `--name=value`."""
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            yield name, value if equals else following


def _read(path: str) -> yaml.Node:
    try:
        with open(path, encoding="utf-8-sig") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}:{error.problem_mark.line + 1} is no YAML: {error.problem}; correct it") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = re.sub(r"\s*\n\s*", " ", str(error).strip())
        raise InputError(f"{path} is no YAML in UTF-8: {reason}; correct it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if root is None:
        raise InputError(f"{path} is empty: give it fields, or leave out --config {path}")
    return root


def _refuse(node: yaml.Node, kind: type, place: str, key: str) -> None:
    """Raise InputError for a key that is there twice or is no name, and for a section that is not made of fields."""
    if isinstance(node, yaml.SequenceNode) and not dataclasses.is_dataclass(kind):
        for number, item in enumerate(node.value):
            _refuse(item, next(iter(typing.get_args(kind)), object), place, f"{key}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for name_node, value in node.value:
            name, line = str(name_node.value), name_node.start_mark.line + 1
            below = f"{key}.{name}" if key else name
            if name_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise InputError(f"{place}:{line} has a key {name} in {key or 'it'}, which is no name: remove it")
            if name in first:
                raise InputError(f"{place}:{line} has {below} twice, first in line {first[name]}: put both into one")
            first[name] = line
            _refuse(value, _type_of(kind, name), place, below)
    elif dataclasses.is_dataclass(kind):
        is_list, is_null = isinstance(node, yaml.SequenceNode), node.tag == "tag:yaml.org,2002:null"
        what = "is a list" if is_list else "is empty" if is_null else f"is {node.value!r}"
        raise InputError(f"{place}:{node.start_mark.line + 1} {key or 'the file'} {what}: give it fields, or remove it")


def _type_of(kind: type, key: str) -> type:
    """The type of the field with this dotted name; object where there is none."""
    for name in key.split("."):
        kind = typing.get_type_hints(kind).get(name, object) if dataclasses.is_dataclass(kind) else object
    return kind
