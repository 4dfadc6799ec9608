"""SIGTERM and SIGINT become a request to save and stop."""

import contextlib
import signal
from collections.abc import Iterator


class StopRequest:
    """Set by the first signal. A second Ctrl-C acts as if nothing had been installed: it ends the process, or does
    nothing where a shell has started it in the background. A second SIGTERM does nothing: schedulers and torchrun each
    deliver one, and the first is being obeyed.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank was told to stop."""
        return self.signal_name is not None

    @classmethod
    def where_ignored(cls, *numbers: signal.Signals) -> contextlib.AbstractContextManager["StopRequest"]:
        """Listen to those of `numbers` that this process was started to ignore, as ranks are in a job (slurm/job.sh):
        what ends others at once would pass such a one by until it trains.
        """
        return cls.on_signals(*(number for number in numbers if signal.getsignal(number) == signal.SIG_IGN))

    @classmethod
    @contextlib.contextmanager
    def on_signals(cls, *numbers: signal.Signals) -> Iterator["StopRequest"]:
        """Listen to `numbers` while open, then restore what was installed before."""
        request = cls()
        previous = {number: signal.getsignal(number) for number in numbers}

        def receive(number: int, frame: object) -> None:
            request.signal_name = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(number, previous[number])

        for number in numbers:
            signal.signal(number, receive)
        try:
            yield request
        finally:
            for number in numbers:
                signal.signal(number, previous[number])
