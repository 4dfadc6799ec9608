"""Plant the mutants one by one in a copy of the tree and run the tests that must catch them.

python -m tests.mutants [NAME ...]     (parts of names; all without)

Ends with 1 if one survives. The tree itself is never written to, and the copy is gone at the end, also after Ctrl-C.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.records import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300
"""For the tests of one mutant: several times what they take on two busy cores."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said."""

    first_failure: str | None
    """id of the first test that failed; None where all passed."""

    seconds: float


class BrokenMutant(Exception):
    """The tests could not speak: the text is not there once, a selection names nothing, the run did not end, or the bug
    is none of those that need a test, because the program crashes under it."""


def copy_tree(source: Path, target: Path) -> None:
    """Tracked and new files, without what git ignores; and the compiled extension, which it does."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=source, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    compiled = [str(path.relative_to(source)) for path in (source / "megatron_ext").rglob("*.so")]
    for name in [*filter(None, listed.split("\0")), *compiled]:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def planted(mutant: Mutant, text: str) -> str:
    """The file's text with the bug in it. Raises BrokenMutant unless the old text stands there exactly once."""
    count = text.count(mutant.old)
    if count != 1:
        raise BrokenMutant(f"{mutant.name}: {mutant.old!r} stands {count} times in {mutant.file}, it must stand once")
    return text.replace(mutant.old, mutant.new)


def run_tests(tree: Path, tests: Sequence[str], timeout_s: float = TIMEOUT_S) -> Outcome:
    """Run `tests` in `tree` up to the first failure. Raises BrokenMutant when anything but a test failed."""
    # No bytecode: a mutant written within a second of the last one, at the same length, would find the other's.
    environment = without_pytest(os.environ) | {
        "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    options = ["-x", "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    started = time.monotonic()
    # A session of its own: its ranks, too, end with it.
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise BrokenMutant(f"the tests {', '.join(tests)} did not end within {timeout_s} s") from None
    finally:
        end_session(process)
    failed = re.search(r"^FAILED (\S+)", output, flags=re.MULTILINE)
    if process.returncode not in (0, 1) or (process.returncode == 1) != bool(failed):
        raise BrokenMutant(f"pytest {' '.join(tests)} ended with {process.returncode}:\n{output[-2000:]}")
    return Outcome(failed[1] if failed else None, time.monotonic() - started)


def without_pytest(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without options for the pytest around this one (PYTEST_ADDOPTS), and without its own marks."""
    return {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}


def end_session(process: subprocess.Popen) -> None:
    """Kill what is left of the process and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def chosen(names: Sequence[str]) -> list[Mutant]:
    """The mutants whose name holds one of `names`; all without names."""
    return [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]


def hunt(mutants: Sequence[Mutant], tree: Path) -> list[Mutant]:
    """Plant each in `tree`, print which test caught it, return those that survived."""
    width = max(len(mutant.name) for mutant in mutants)
    survivors = []
    started = time.monotonic()
    for number, mutant in enumerate(mutants, start=1):
        file = tree / mutant.file
        original = file.read_text(encoding="utf-8")
        file.write_text(planted(mutant, original), encoding="utf-8")
        outcome = run_tests(tree, mutant.tests)
        file.write_text(original, encoding="utf-8")
        if outcome.first_failure is None:
            survivors.append(mutant)
        left = (time.monotonic() - started) / number * (len(mutants) - number)
        verdict = f"caught by {outcome.first_failure}" if outcome.first_failure else "SURVIVED"
        print(
            f"{number:>2}/{len(mutants)}  {mutant.name:<{width}}  {outcome.seconds:>4.0f} s  {verdict}  "
            f"(ETA {left / 60:.1f} min)",
            flush=True,
        )
    return survivors


def main(names: Sequence[str]) -> int:
    """Hunt the mutants that `names` choose; 0 when all were caught, 1 when one survived, 2 when one is broken."""
    mutants = chosen(names)
    if not mutants:
        print(f"no mutant is called {' or '.join(names)}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            tree = Path(folder)
            copy_tree(ROOT, tree)
            for mutant in mutants:
                planted(mutant, (tree / mutant.file).read_text(encoding="utf-8"))
            tests = sorted({test for mutant in mutants for test in mutant.tests})
            print(f"{len(mutants)} mutants; first the tests without any", flush=True)
            sound = run_tests(tree, tests, 4 * TIMEOUT_S)
            if sound.first_failure:
                raise BrokenMutant(f"{sound.first_failure} fails without any mutant: repair it first")
            print(f"all pass, {sound.seconds:.0f} s", flush=True)
            survivors = hunt(mutants, tree)
    except BrokenMutant as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for mutant in survivors:
        print(f"SURVIVED: {mutant.name} ({mutant.resembles}): write the test that {mutant.file} lacks")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    sys.exit(main(sys.argv[1:]))
