"""Rooms import to the left only; some never import certain libraries."""

import graphlib

from tests.architecture.source import ROOT, imported_modules, name_of, product_files, room_of

# Left may be imported by right. Rooms of one level may import each other, in one direction.
LEVELS = (
    {"config", "files", "processes", "plan", "vocab", "media"},
    {"runtime"},
    {"data", "model", "vision"},
    {"objectives", "optim", "checkpoint", "hf", "observe"},
    {"resilience", "generate", "curate", "job"},
    {"train"},
    {"pretrain_emu3", "tokenizer_train", "tools", "examples"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE = {"tokenizer_train", "pretrain_emu3", "tools", "examples"}

# room: what none of its files may import, by first words of the module's name
FORBIDDEN = {
    "config": ("torch", "numpy", "megatron.core"),
    "files": ("torch", "numpy", "megatron.core"),
    "processes": ("torch", "numpy", "megatron.core"),
    "plan": ("torch",),
    "vocab": ("torch", "megatron.core"),
    "job": ("torch", "megatron.core"),
    "tokenizer_train": ("megatron_ext.model", "megatron_ext.train", "megatron_ext.objectives", "megatron.core"),
}
FORBIDDEN_EVERYWHERE = ("megatron.training", "apex", "emu3_tools")


def imported_room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "megatron_ext" and len(parts) > 1:
        return parts[1]
    return parts[0] if parts[0] in OUTSIDE else None


def edges() -> list[tuple[str, str, str]]:
    """(importing room, imported room, file:line) of all imports that cross rooms."""
    return [
        (room_of(path), room, f"{name_of(path)}:{line}")
        for path in product_files()
        for module, line in imported_modules(path)
        if (room := imported_room(module)) is not None and room != room_of(path)
    ]


def test_every_room_has_its_level():
    rooms = {room_of(path) for path in product_files()} - {"megatron_ext", "setup"}
    assert rooms <= LEVEL_OF.keys(), "a new room: add it to the order, or put the file where it belongs"


def test_imports_go_to_the_left():
    wrong = [
        f"{place}: {importing} imports {imported}"
        for importing, imported, place in edges()
        if LEVEL_OF[imported] > LEVEL_OF[importing]
        or (imported in OUTSIDE and importing != "examples")  # programs are entered, never imported
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for importing, imported, _ in edges():
        graph.setdefault(importing, set()).add(imported)
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert {"config", "train"} <= set(order) <= LEVEL_OF.keys()


def test_forbidden_imports():
    wrong = [
        f"{name_of(path)}:{line}: {module}"
        for path in product_files()
        for module, line in imported_modules(path)
        for prefix in FORBIDDEN_EVERYWHERE + FORBIDDEN.get(room_of(path), ())
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_rooms_without_a_noun():
    nameless = {"utils", "common", "misc", "helpers"}
    wrong = [name_of(path) for path in product_files() if nameless & {*path.relative_to(ROOT).parts, path.stem}]
    assert not wrong
