"""tools/tokenize_vision.py, killed before its first rename, its second, and so on, each time into a folder of its own.

python -m tests.unit.vision.killed FOLDER ARGUMENT...: prints how many renames there are. A program of its own, because
a copy of a process that has computed with torch before cannot: its threads are not copied.
"""

import itertools
import os
import signal
import sys

from tools import tokenize_vision


def is_killed(arguments: list[str], moment: int) -> bool:
    """Run in a copy of this process that kills itself before its rename number `moment`; False where it has fewer."""
    child = os.fork()
    if child == 0:
        renames, rename = itertools.count(1), os.replace

        def replace(*names: str) -> None:
            if next(renames) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*names)

        os.replace = replace
        try:
            tokenize_vision.main(arguments)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"moment {moment}: exit code {code}")
    return code != 0


if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    moments = itertools.count(1)
    print(next(moment for moment in moments if not is_killed([*options, f"--output={folder}/{moment}"], moment)) - 1)
