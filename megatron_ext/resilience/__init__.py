"""Stopping in good order, and what a run does about bad steps, hangs, slow ranks and silent errors."""

from megatron_ext.resilience.signals import StopRequest
from megatron_ext.resilience.stopping import Stopping
from megatron_ext.resilience.watchdog import Watchdog

__all__ = ["StopRequest", "Stopping", "Watchdog"]
