"""The C++ extension; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_ext.data._packing",
            ["megatron_ext/data/_packing.cpp"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ]
)
