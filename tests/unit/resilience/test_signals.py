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


def test_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest.on_signals(signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
