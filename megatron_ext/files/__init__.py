"""Files that are whole or absent, whatever happens while they are written."""

from megatron_ext.files.replace import replacing, writing

__all__ = ["replacing", "writing"]
