"""The soak's log as a table, and its place in the documentation."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.soak import plan

DOCUMENT, LOG = "operations.md", "soak.jsonl"
"""In the folder of the documentation."""

BLOCK = re.compile(r"(?<=<!-- soak -->\n).*?(?=<!-- end of soak -->\n)", re.DOTALL)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: what was killed, when, how often, what lay on the disk then; under it how it ended."""
    kills = [record for record in records if "kill" in record]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in kills:
        groups.setdefault((record["target"], record["moment"]), []).append(record)
    rows = [("target", "moment", "kills", "on disk then", "unusable")]
    for (target, moment), members in sorted(groups.items(), key=_order):
        states = Counter(member["state"] for member in members)
        shown = ", ".join(f"{state} {count}" for state, count in states.most_common())
        rows.append((target, moment, str(len(members)), shown, str(sum(bool(m["unusable"]) for m in members))))
    states = Counter(record["state"] for record in kills)
    lines = [_row(rows[0]), _row(["---"] * len(rows[0])), *map(_row, rows[1:]), "", _ending(records, kills), ""]
    lines += [f"- {state}: {count}" for state, count in states.most_common()]
    return "\n".join(lines) + "\n"


def write_into(folder: Path, log: Path) -> None:
    """Put the log and its table into the documentation."""
    records = read_log(log)
    (folder / LOG).write_text(log.read_text(encoding="utf-8"), encoding="utf-8")
    document = folder / DOCUMENT
    text = document.read_text(encoding="utf-8")
    document.write_text(BLOCK.sub(lambda match: table(records), text), encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines only."""
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _order(item: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    """By target as the plan names them, then by moment."""
    target, moment = item[0]
    targets = (plan.RANK, plan.MAIN_RANK, plan.ALL_RANKS, plan.WRITER, plan.EVERYTHING, plan.TORCHRUN)
    targets += (plan.TERMINATE, plan.ONE_FILE_FULL, plan.ALL_FILES_FULL)
    return targets.index(target), (plan.START_UP, plan.ANY_TIME, *plan.MOMENTS).index(moment)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ending(records: Sequence[dict[str, Any]], kills: Sequence[dict[str, Any]]) -> str:
    unusable = sum(bool(record["unusable"]) for record in kills)
    text = f"{len(kills)} kills (seed {records[0]['seed']}), {unusable} unusable checkpoints"
    ends = [record["end"] for record in records if "end" in record]
    if not ends:
        return f"{text}; not finished."
    (end,) = ends
    interrupted = sum(record["time"] for record in records if "interrupted" in record)
    minutes = end["minutes"] - (sum(record.get("taken_up", 0) for record in records) - interrupted) / 60
    return (
        f"{text}; {end['start']} starts, {end['resume']} of which came to train, {end['save']} saves, "
        f"{end['save_failed']} failed saves, {minutes:.0f} minutes. All {end['steps']} steps of metrics.jsonl "
        f"outside `timing`, compared bit for bit with an undisturbed run: {end['verdict']}. What the kills met:"
    )
