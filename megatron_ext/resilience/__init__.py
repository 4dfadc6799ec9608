"""Stopping in good order."""

from megatron_ext.resilience.signals import StopRequest
from megatron_ext.resilience.stopping import Stopping

__all__ = ["StopRequest", "Stopping"]
