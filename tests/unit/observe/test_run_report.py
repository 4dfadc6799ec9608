"""tools/run_report.py on the logs of a long run, written by hand."""

import json
from pathlib import Path

import pytest

from megatron_ext.config import InputError
from megatron_ext.observe.report import curves
from tools import run_report

STEPS = 4001
SLOW = 2345
"""The one slow step."""


@pytest.fixture
def long_run(tmp_path) -> Path:
    """Losses 1, 0, 1, 0, ...: every second of them is as wrong as it can be about the mean of its neighbours."""
    metrics = [
        {
            "step": step,
            "loss": step % 2,
            "timing": {"step_seconds": 9.0 if step == SLOW else 1.0, "tokens_per_second": 1 + step % 2},
        }
        for step in range(1, STEPS + 1)
    ]
    events = [{"event": "start", "time": 0.0}, {"event": "resume", "time": 1.0, "step": 0}]
    events.append({"event": "end", "time": STEPS + 20.0, "step": STEPS, "finished": True})
    for name, records in (("events", events), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text("{}\n")
    return tmp_path


def test_a_long_run_is_thinned_after_it_is_averaged(long_run, monkeypatch):
    drawn = {}

    def noting(series, **style):
        drawn.update({name: (points, style["faint"][name]) for name, points in series.items()})
        return curves(series, **style)

    monkeypatch.setattr(run_report, "curves", noting)
    run_report.main(["--run", str(long_run)])
    for name, mean in (("loss", 0.5), ("tokens/s", 1.5)):
        (steps, means), (single_steps, singles) = drawn[name]
        assert steps == single_steps and steps[-1] == STEPS and 1000 < len(steps) <= run_report.POINTS
        assert means[20:] == [mean] * len(means[20:]) and singles == [step % 2 + mean - 0.5 for step in steps]
    page = (long_run / "report.html").read_text()
    assert "longest" in page and ">9" in page.split("longest")[1].split("</table>")[0]


@pytest.mark.parametrize("span", [0, -1])
def test_a_span_of_no_steps_is_refused(tmp_path, span):
    with pytest.raises(InputError, match=f"span {span}: must be at least 1"):
        run_report.main(["--run", str(tmp_path), "--span", str(span)])
