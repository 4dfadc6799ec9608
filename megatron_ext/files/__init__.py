"""Files that are whole or absent, whatever happens while they are written, and folders with one writer at a time."""

from megatron_ext.files.ahead import check_file, check_folder
from megatron_ext.files.limits import check_open_files
from megatron_ext.files.lines import read_json_lines
from megatron_ext.files.lock import alone_in
from megatron_ext.files.replace import replacing, writing

__all__ = ["alone_in", "check_file", "check_folder", "check_open_files", "read_json_lines", "replacing", "writing"]
