"""What a run tells: metrics and events in its folder, TensorBoard, console lines, HTML reports."""

from megatron_ext.observe.run import Run

__all__ = ["Run"]
