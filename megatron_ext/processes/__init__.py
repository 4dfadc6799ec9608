"""Processes that do not live on when the one that started them is gone."""

from megatron_ext.processes.parent import end_with_parent, stop_with_launcher

__all__ = ["end_with_parent", "stop_with_launcher"]
