"""The C++ extensions; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            f"megatron_ext.data.{name}",
            [f"megatron_ext/data/{name}.cpp"],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
        for name in ("_clusters", "_packing")
    ]
)
