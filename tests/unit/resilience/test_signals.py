"""The first signal is a request; the second one acts as before."""

import os
import signal

import pytest

from megatron_ext.resilience import StopRequest


def test_first_signal_requests_a_stop():
    with StopRequest.on_signals(signal.SIGTERM, signal.SIGINT) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.signal_name == "SIGINT"


def test_second_sigterm_changes_nothing():
    with StopRequest.on_signals(signal.SIGTERM) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"


def test_second_interrupt_acts_as_before():
    with StopRequest.on_signals(signal.SIGINT) as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_interrupt_is_ignored_where_the_first_would_have_been():
    """A shell starts jobs in the background so: they hear the first, of which they save and stop, and no other."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest.on_signals(signal.SIGINT) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_name == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest.on_signals(signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
