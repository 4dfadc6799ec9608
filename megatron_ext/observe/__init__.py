"""What a run tells: metrics and events in its folder, TensorBoard, console lines, HTML reports."""

from megatron_ext.observe.run import Run
from megatron_ext.observe.writers import read_json_lines

__all__ = ["Run", "read_json_lines"]
