"""Files: found by the user's paths, read whatever program wrote them, written whole or not at all; folders with one
writer at a time."""

from megatron_ext.files.ahead import check_file, check_folder
from megatron_ext.files.limits import check_open_files
from megatron_ext.files.lines import read_json_lines
from megatron_ext.files.lock import alone_in
from megatron_ext.files.paths import files_named, named, suffix_of, walk
from megatron_ext.files.read import parse_json, reading, text_of
from megatron_ext.files.replace import replacing, writing

__all__ = [
    "alone_in",
    "check_file",
    "check_folder",
    "check_open_files",
    "files_named",
    "named",
    "parse_json",
    "read_json_lines",
    "reading",
    "replacing",
    "suffix_of",
    "text_of",
    "walk",
    "writing",
]
