"""A run as a job in a queue: what is checked before it waits, what its starts and ends leave behind. No torch."""

from megatron_ext.job.history import End, begin, end
from megatron_ext.job.place import Request, check_place

__all__ = ["End", "Request", "begin", "check_place", "end"]
