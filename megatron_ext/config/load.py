"""Read a configuration dataclass: defaults < YAML file(s), left to right < command line.

jsonargparse does the parsing; this module fixes its settings (the sentence under a field is its --help text),
turns its errors into one line, and names the nearest key when one is unknown. Only `load` imports it: code
that is given its sections needs no parser.
"""

import contextlib
import dataclasses
import difflib
import re
import typing
from typing import Any, TypeVar

import yaml

from megatron_ext.config.errors import InputError, one_line
from megatron_ext.config.yaml_file import refuse_broken_yaml

Config = TypeVar("Config")

REFUSED = {
    "pipeline_model_parallel_size": "the layout is tensor x context x data parallel, as in the paper",
    "virtual_pipeline_model_parallel_size": "the layout is tensor x context x data parallel, as in the paper",
    "expert_model_parallel_size": "Emu3 is dense: there are no experts",
    "num_moe_experts": "Emu3 is dense: there are no experts",
    "mtp_num_layers": "Emu3 predicts one next token",
    "tie_word_embeddings": "Emu3's embedding and head are two matrices",
    "share_embeddings_and_output_weights": "Emu3's embedding and head are two matrices",
    "untie_embeddings_and_output_weights": "Emu3's embedding and head always are two matrices",
}
"""Keys that other stacks have and this one has not, for a reason."""


def load(config_type: type[Config], argv: list[str], *, prog: str | None = None) -> Config:
    """The frozen dataclass `config_type` as `argv` (without the program's name) describes it.

    `--config FILE` may be given several times; `--print_config` prints the result as YAML and exits with 0.

    Raises:
        InputError: an unknown key (with the nearest known one), a wrong type, an unreadable file; all sections whose
            values are out of their bounds, in one line.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; may be repeated, later files win.")
    parser.add_class_arguments(config_type, nested_key=None)
    parser.description = (config_type.__doc__ or "").strip()
    refuse_broken_yaml(config_type, argv)
    printed = [word for word in argv if word.partition("=")[0] == "--print_config"]
    if printed:  # what is printed is checked too; what is required may be missing
        with contextlib.suppress(jsonargparse.ArgumentError):
            _build(config_type, parser.parse_args([word for word in argv if word not in printed]), "")
    try:
        values = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise InputError(_explain(str(error), config_type)) from None
    return _build(config_type, values, "")


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data that YAML and JSON can hold: tuples become lists."""
    if dataclasses.is_dataclass(config):
        return {field.name: as_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [as_dict(item) for item in config]
    return config


def to_yaml(config: Any) -> str:
    """A configuration as the YAML text that `load` reads back to the same object."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def known_keys(config_type: type) -> list[str]:
    """Dotted names of all fields, sections and the items of lists included: `data.train.prefix`."""
    keys = []
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        keys.append(field.name)
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                keys += [f"{field.name}.{key}" for key in known_keys(inner)]
    return keys


def _build(kind: Any, values: Any, key: str) -> Any:
    """What jsonargparse parsed as the dataclasses it stands for, `key` its dotted name. What is wrong in several
    sections is told at once, with the name under which each of them stands here."""
    if isinstance(values, (list, tuple)):
        items = typing.get_args(kind)
        return type(values)(_build(items[0] if items else Any, item, f"{key}[{n}]") for n, item in enumerate(values))
    if not hasattr(values, "__dict__"):
        return values
    kind = next((inner for inner in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(inner)), kind)
    fields, faults = {}, []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        try:
            if field.name in values:  # an item of a list has what was given, everything else all fields
                name = f"{key}.{field.name}" if key else field.name
                fields[field.name] = _build(hints[field.name], values[field.name], name)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))
    try:
        return kind(**fields)
    except InputError as error:
        raise InputError(_named(str(error), getattr(kind, "section_name", ""), key)) from None


def _named(fault: str, section: str, key: str) -> str:
    """What a section says of itself, under the name that it has here."""
    if key in ("", section):
        return fault
    if not section:
        return f"{key}: {fault}"
    return re.sub(rf"\b(?<!\.){section}\.", f"{key}.", fault)


def _explain(message: str, config_type: type) -> str:
    """jsonargparse's message on one line, with the nearest known key when it names an unknown one."""
    message = one_line(message)
    message = re.sub(r"Problem with given class_path '[^']*': ", "", message)
    message = re.sub(
        r"Not a valid subclass of (\w+)\. (Got value: .*) Subclass types expect.*", r"Expected fields. \2", message
    )
    unknown = re.search(
        r"unrecognized arguments: --(?P<argument>[\w.]+)"
        r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<field>\w+)'"
        r"|Option '(?P<option>[\w.]+)' is not accepted",
        message,
    )
    if not unknown:
        return message
    key = unknown["argument"] or unknown["option"] or f"{unknown['group']}.{unknown['field']}"
    if reason := REFUSED.get(key.rsplit(".", 1)[-1]):
        return f"configuration key {key!r} is not supported: {reason}; remove it"
    # A key inside a list item is reported without its path: compare the last part too.
    known = known_keys(config_type)
    by_tail = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    nearest = difflib.get_close_matches(key, known, n=1) or [
        by_tail[tail] for tail in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_tail, n=1)
    ]
    hint = f"did you mean {nearest[0]!r}?" if nearest else "--help lists the known keys"
    return f"unknown configuration key {key!r}: {hint}"
