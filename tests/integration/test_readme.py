"""The documents are true: their commands parse, runs they start fit on the ranks they start, links and files exist."""

import importlib
import re
import tomllib

import pytest

from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.plan.job import USABLE_SHARE, plan_job
from megatron_ext.plan.question import take_question
from tests.architecture.source import ROOT
from tests.support.documented import DOCUMENTS, command_lines, opening_commands, started_run

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
PROGRAMS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
COMMANDS = [command for text in TEXTS.values() for command in command_lines(text)]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.read_text().startswith("#")]
SHOWN = COMMANDS + [command for path in EXAMPLES for command in opening_commands(path.read_text(encoding="utf-8"))]


def is_complete(command: list[str]) -> bool:
    """Whether it can be typed as it stands: no `...`, no `[--option]`, no file that the reader has to name."""
    files = [value for option, value in zip(command, command[1:], strict=False) if option == "--config"]
    return all((ROOT / name).exists() for name in files) and not {"...", "$i"} & {*command}


def program_and_arguments(command: list[str]) -> tuple[str, list[str]]:
    """`python x/y.py ARGUMENTS`, `python -m x.y ARGUMENTS` and `emu3-y ARGUMENTS` as module and arguments."""
    if command[0] in PROGRAMS:
        return PROGRAMS[command[0]].split(":")[0].replace("emu3_tools", "tools"), command[1:]
    if "-m" in command:
        position = command.index("-m") + 1
        return command[position], command[position + 1 :]
    position = next(index for index, part in enumerate(command) if part.endswith(".py"))
    return command[position].removesuffix(".py").replace("/", "."), command[position + 1 :]


# Scripts are tested in tests/slurm; benchmarks have parsers of their own.
PARSED = [
    command
    for command in SHOWN
    if is_complete(command) and command[0] != "bash" and not any(word.startswith("benchmarks/") for word in command)
]
STARTED = [command for command in SHOWN if started_run(command) and is_complete(command)]


@pytest.mark.parametrize("command", PARSED, ids=lambda command: program_and_arguments(command)[0])
def test_commands_parse(command, capsys):
    module, arguments = program_and_arguments(command)
    program = importlib.import_module(module)
    with pytest.raises(SystemExit) as end:
        program.main([*arguments, "--print_config"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", STARTED, ids=" ".join)
def test_runs_fit_on_the_ranks_that_start_them(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    ranks, arguments = started_run(command)
    config = load(RunConfig, arguments)
    if config.vocab.layout == "custom":
        return  # tests/unit/plan/test_examples.py has the text tokenizer that the quickstart makes
    question = take_question(["--dry_run", "--world_size", str(ranks)])[0]
    plan = plan_job(config, question)
    assert not plan.faults
    assert plan.memory.peak < USABLE_SHARE * question.memory_gib * 2**30


def test_several_nodes_are_told_where_to_meet():
    """Without a rendezvous each of them waits for itself."""
    several = [command for command in SHOWN if "--nnodes" in command]
    assert several and all("--rdzv-endpoint" in command for command in several)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^    make ([\w-]+)", "\n".join(TEXTS.values()), flags=re.MULTILINE))
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_it_names_exist(document):
    folders = "examples|docs|tools|tests|slurm|benchmarks|megatron_ext|tokenizer_train"
    names = re.findall(rf"`((?:{folders})/[\w/.-]+|[A-Z]{{3,}}\.md)`", TEXTS[document])
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_tolerance_names_its_test():
    """In its own row: rows are inserted, and a reference to the one before would then mean another."""
    table = TEXTS["docs/numerics.md"].split("\n\n")
    rows = [line.strip("| ").split(" | ") for block in table for line in block.splitlines() if line.startswith("|")]
    rows = [row for row in rows if len(row) == 5 and set(row[0]) != {"-"} and row[0] != "what"]
    assert len(rows) > 50
    assert [row[0] for row in rows if not re.search(r"`tests/[\w/]+\.py`", row[4])] == []
    assert [row[0] for row in rows if {"same", "the same", "both"} & {*row}] == []


def test_nothing_is_left_to_fill_in():
    left = {name: re.findall(r"\b(?:MEASURED|TODO|TBD|FIXME|[A-Z]+_COST)\b", text) for name, text in TEXTS.items()}
    assert {name: words for name, words in left.items() if words} == {}


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", (*DOCUMENTS, "CHANGELOG.md", "CONTRIBUTING.md"))
def test_links_lead_somewhere(document):
    place = ROOT / document
    text = place.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = place.parent / file if file else place
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_every_document_is_linked():
    linked = {f"docs/{name}" for name in re.findall(r"\]\(docs/(\w+\.md)\)", TEXTS["README.md"])}
    upstream = {name for name in DOCUMENTS if name.startswith("docs/upstream_")}  # linked by docs/checkpoints.md
    assert linked == {*DOCUMENTS} - {"README.md", *upstream}
