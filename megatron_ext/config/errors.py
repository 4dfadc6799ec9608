"""Bad input: one clear line for the user; a traceback is kept for our own bugs."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input is at fault. The message names the field or file, its value and the fix, in one line."""


def run_program(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(argv)` and exit: 0 when done, 2 after an InputError, 130 after Ctrl-C.

    An InputError is printed as one line on stderr; every other exception keeps its traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
