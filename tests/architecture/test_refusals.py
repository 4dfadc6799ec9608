"""No room refuses a configuration of a run that the plan accepted: where a room's InputError names a field, either the
sections and rules of config/ have refused it before, or it depends on what no plan can see."""

import ast
import dataclasses
import re

from megatron_ext.config.run import RunConfig
from tests.architecture.source import name_of, product_files, room_of, syntax

FIELDS = re.compile(
    r"\b("
    + "|".join(
        rf"{section.name}\.({'|'.join(field.name for field in dataclasses.fields(kind))})"
        for section in dataclasses.fields(RunConfig)
        for kind in [section.type]
    )
    + r")\b"
)

FILES, MACHINE, COURSE, RULE, OTHER = (
    "what files hold: datasets, checkpoints, models",
    "the machine: its devices, packages, disk and permissions",
    "the course of the run: its steps, its gradient buckets, what its checkpoints were made with",
    "the message of a rule of config/, for who calls the room without a configuration of a run",
    "another program's purpose: an export, a preprocessing, a proof, a question to the plan",
)

DEPENDS_ON = {
    "checkpoint/decoder.py _check_same_parts": FILES,
    "checkpoint/decoder.py _contradictory": FILES,
    "checkpoint/decoder.py check_format": COURSE,
    "checkpoint/decoder.py load_initial": FILES,
    "checkpoint/room.py check_room": MACHINE,
    "data/batch.py context_indices": RULE,
    "data/inputs.py vision_tokenizer": OTHER,
    "data/loader.py _refuse_misfits": FILES,
    "data/loader.py resumed": COURSE,
    "data/object_store.py __init__": RULE,
    "data/packing.py __post_init__": RULE,
    "data/progress.py go_on": COURSE,
    "data/windows.py _pack": FILES,
    "files/lock.py alone_in": MACHINE,
    "hf/baai.py _check_fits": OTHER,
    "hf/convert.py _check_fits": FILES,
    "hf/tokenizer.py _sentencepiece": OTHER,
    "hf/tokenizer.py _unigram": OTHER,
    "job/place.py _another": COURSE,
    "job/place.py _check_devices": MACHINE,
    "job/place.py _check_files": MACHINE,
    "model/specs.py check_modules": MACHINE,
    "observe/compare.py read": FILES,
    "observe/history.py consumed_before": COURSE,
    "observe/profile.py __init__": MACHINE,
    "observe/weights_and_biases.py __init__": MACHINE,
    "plan/suggest.py suggest_layouts": OTHER,
    "tools/inspect_data.py of": OTHER,
    "train/initial.py resume_or_init": FILES,
    "train/loop.py _after_bad_step": COURSE,
    "train/loop.py _rewind": COURSE,
    "train/verify.py verify": OTHER,
}
"""File and function -> why its refusals are not the plan's; one that refuses nothing any more is taken out."""


def refusals() -> dict[str, list[str]]:
    """File and function -> the InputErrors outside config/ whose text names a field of a run's configuration."""
    found: dict[str, list[str]] = {}
    for path in product_files():
        if room_of(path) == "config" or {"tokenizer_train", "examples"} & set(path.parts):
            continue
        for function in ast.walk(syntax(path)):
            if isinstance(function, ast.FunctionDef):
                place = f"{name_of(path).removeprefix('megatron_ext/')} {function.name}"
                texts = [text for node in ast.walk(function) if (text := _refusal(node)) and FIELDS.search(text)]
                found |= {place: texts} if texts else {}
    return found


def _refusal(node: ast.AST) -> str:
    """The words of an InputError, without its values."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError"):
        return ""
    parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return "".join(part for part in parts if isinstance(part, str))


def test_what_rooms_refuse_and_no_plan_can_is_known():
    found = refusals()
    new = {place: texts for place, texts in found.items() if place not in DEPENDS_ON}
    assert not new, f"let config/ refuse it (a bound, a check of the section, a rule), or say why it cannot: {new}"
    assert DEPENDS_ON.keys() <= found.keys(), "these refuse nothing any more: take them out"


def test_sections_are_found():
    """The pattern sees the fields of every section."""
    for section in dataclasses.fields(RunConfig):
        field = dataclasses.fields(section.type)[0]
        assert FIELDS.fullmatch(f"{section.name}.{field.name}")
