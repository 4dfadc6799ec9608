"""Files of JSON lines, which a kill may have cut in the last one."""

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file that may still be written to: a last line without its end is left out."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
