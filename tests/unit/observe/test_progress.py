"""Progress without a terminal: plain lines with rate and time left."""

import io

from rich.console import Console

from megatron_ext.observe import progress as progress_module
from megatron_ext.observe.progress import progress


def test_plain_lines(monkeypatch):
    clock = iter([0.0, 4.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    with progress("tokenize", 40, "pictures", Console(file=output, width=30)) as advance:
        for _ in range(4):
            advance(10)
    # 4 s after the start is too early for a line; 6 s and the last item are not.
    assert output.getvalue().splitlines() == [
        "tokenize: 20/40 pictures | 3.3 pictures/s | ETA 6s",
        "tokenize: 40/40 pictures | 3.6 pictures/s | ETA 0s",
    ]


def test_a_first_report_that_nothing_is_done_yet(monkeypatch):
    clock = iter([0.0, 7.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    with progress("preprocess", 40, "bytes", Console(file=output)) as advance:
        advance(0)
    assert output.getvalue().splitlines() == ["preprocess: 0/40 bytes | 0.0 bytes/s | ETA unknown"]


def test_a_total_that_becomes_known(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    output = io.StringIO()
    with progress("tokenize", 40, "pictures", Console(file=output)) as advance:
        advance(10, 20)
        advance(10, 50)
        advance(10, 30)
    assert output.getvalue().splitlines() == [
        "tokenize: 10/20 pictures | 2.0 pictures/s | ETA 5s",
        "tokenize: 20/50 pictures | 2.0 pictures/s | ETA 15s",
        "tokenize: 30/30 pictures | 2.7 pictures/s | ETA 0s",
    ]
    monkeypatch.undo()
    terminal = Console(file=output, force_terminal=True, width=100)
    with progress("tokenize", 40, "pictures", terminal) as advance:
        advance(10, 20)
    assert "10/20" in output.getvalue()
