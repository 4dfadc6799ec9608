"""Bad input: one clear line for the user; a traceback is kept for our own bugs."""

import re
import sys
from collections.abc import Callable

LONGEST_REASON = 300
"""Characters of a library's words that stand in a message of ours."""

_ESCAPE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a title or a link, up to its end
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours and movements of the cursor
    r"|\x1b[ -/]*[0-~]?"
)
_UNPICKLER = re.compile(r"WeightsUnpickler error: (.*?)(?:\. Please use `torch|\n|$)")
"""What torch.load found, amid its advice on how to run what a file from a stranger holds."""
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """`text` as one line that a terminal shows as it is: without line ends, escape codes and control characters."""
    lines = (_CONTROL.sub("", line).strip() for line in _ESCAPE.sub("", text).splitlines())
    return " ".join(filter(None, lines))


def reason_of(error: BaseException | str, longest: int = LONGEST_REASON) -> str:
    """What a library says, in its exception or as text: words of one line, at most `longest` characters of them, cut
    between two words. What the system says of a file stands without the path, which our message names."""
    said = getattr(error, "strerror", None) or str(error)  # FFmpeg's errors have it, too
    if found := _UNPICKLER.search(said):
        said = found[1]
    words = " ".join(one_line(said).split()) or type(error).__name__
    if len(words) <= longest:
        return words
    whole, _, _ = words[: longest + 1].rpartition(" ")
    return f"{whole or words[:longest]} ..."


class InputError(ValueError):
    """The user's input is at fault. The message names the field or file, its value and the fix, in one line, whatever
    the words of a library that it quotes."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class BadSamples:
    """Samples that cannot be used: skipped, counted and named; too large a share of them stops the program."""

    NAMED = 3
    """How many of them the stopping line names."""

    EARLY, PLAIN = 1000, 2
    """After so many samples a share that is so many times the allowed one stops the work before its end."""

    def __init__(self, max_fraction: float, *, field: str = "max_bad_fraction") -> None:
        """`field` is the option that holds `max_fraction`. Raises InputError for a fraction outside 0..1."""
        if not 0 <= max_fraction <= 1:
            raise InputError(f"{field} is {max_fraction}: give a share in 0..1")
        self.samples: list[tuple[str, str]] = []
        """(source, why it cannot be used) of each, in the order they came; several may have one source."""
        self._max_fraction = max_fraction
        self._field = field

    def add(self, source: str, reason: str) -> None:
        """One more: the caller adds a sample once. Bytes of `source` that are not UTF-8 are kept as `\\xNN`."""
        source = source.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.samples.append((one_line(source), one_line(reason)))

    def check(self, total: int) -> None:
        """Raise InputError when they are more than the allowed share of `total` samples."""
        if len(self.samples) > self._max_fraction * total:
            self._stop(f"{len(self.samples):,} of {total:,} samples")

    def check_early(self, seen: int, total: int | None) -> None:
        """Raise InputError after `seen` of `total` samples (None: not known) when they are, or plainly will be, more
        than the allowed share of all.

        Certain is a number that is too large for all samples; plain, where their number is not known, a share of
        PLAIN times the allowed one among at least EARLY samples, and any bad sample where none is allowed.
        """
        if total is not None:
            self.check(total)
        elif seen >= self.EARLY and len(self.samples) > self.PLAIN * self._max_fraction * seen:
            self._stop(f"{len(self.samples):,} of the first {seen:,} samples")
        elif self._max_fraction == 0:
            self.check(seen)

    def _stop(self, how_many: str) -> None:
        named = [f"{source}: {reason}" for source, reason in self.samples[: self.NAMED]]
        more = "; ..." if len(self.samples) > self.NAMED else ""
        raise InputError(
            f"{how_many} cannot be used, more than {self._field} "
            f"{self._max_fraction:g} ({'; '.join(named)}{more}): repair or remove them, or raise {self._field}"
        )

    def lines(self) -> list[str]:
        """A line for each."""
        return [f"skipped {source}: {reason}" for source, reason in self.samples]


def run_program(
    main: Callable[[list[str]], None],
    argv: list[str] | None = None,
    *,
    tells: Callable[[Exception], bool] = lambda error: True,
) -> None:
    """Run a program's `main(argv)` and exit: 0 when done, 2 after an InputError, 130 after Ctrl-C.

    An InputError is printed as one line on stderr; every other exception keeps its traceback. Where `tells` says False
    another process reports the fault: this one exits with 2 and says nothing.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except Exception as error:
        is_told = tells(error)
        if is_told and not isinstance(error, InputError):
            raise
        if is_told:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
