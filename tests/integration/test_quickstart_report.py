"""The report's reading of a run: where a layout begins, and steps that lack a kind of token."""

import importlib.util
import json
import sys

from tests.architecture.source import ROOT

_spec = importlib.util.spec_from_file_location("quickstart_report", ROOT / "examples" / "quickstart_report.py")
quickstart_report = importlib.util.module_from_spec(_spec)
sys.modules["quickstart_report"] = quickstart_report
_spec.loader.exec_module(quickstart_report)


def start(tensor: int, context: int) -> dict:
    parallel = {"tensor_model_parallel_size": tensor, "context_parallel_size": context}
    return {"event": "start", "config": {"parallel": parallel}}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_layouts_are_marked_where_they_begin(tmp_path):
    events = [start(2, 1), {"event": "resume", "step": 0}, start(2, 1), {"event": "resume", "step": 30}]
    events += [start(1, 2)]  # ended before it resumed
    events += [start(1, 2), {"event": "resume", "step": 45}, start(2, 2), {"event": "resume", "step": 60}]
    write(tmp_path / "events.jsonl", events)
    write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 1, "valid_loss": 3.0}])
    training, evaluation, layouts = quickstart_report.load_run(tmp_path)
    assert (len(training), len(evaluation)) == (1, 1)
    assert layouts == {
        0: "tensor parallel 2",
        45: "context parallel 2",
        60: "tensor parallel 2 × context parallel 2",
    }


def test_a_step_without_visual_tokens_has_no_point():
    records = [{"step": 1, "loss_vision": 2.0}, {"step": 2, "loss_vision": None}, {"step": 3, "loss_vision": 1.0}]
    assert quickstart_report.column(records, "loss_vision") == ([1, 3], [2.0, 1.0])
