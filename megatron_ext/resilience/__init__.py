"""Stopping in good order."""

from megatron_ext.resilience.signals import StopRequest

__all__ = ["StopRequest"]
