"""Configuration: frozen dataclasses, one file per section, read by `load`."""

from megatron_ext.config.errors import BadSamples, InputError, one_line, reason_of, run_program
from megatron_ext.config.load import as_dict, load, to_yaml

__all__ = ["BadSamples", "InputError", "as_dict", "load", "one_line", "reason_of", "run_program", "to_yaml"]
