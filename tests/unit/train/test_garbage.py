"""Garbage is collected at the given steps and at no others."""

import gc
import weakref

from megatron_ext.train.garbage import collected_every


class Node:
    """A cycle: only the collector frees it."""

    def __init__(self) -> None:
        self.me = self


def test_collected_at_multiples_only():
    with collected_every(10) as collect:
        assert not gc.isenabled()
        watched = weakref.ref(Node())
        collect(9)
        assert watched() is not None
        collect(10)
        assert watched() is None
    assert gc.isenabled()


def test_interval_zero_leaves_python_alone():
    with collected_every(0) as collect:
        assert gc.isenabled()
        watched = weakref.ref(Node())
        collect(0)
        assert watched() is not None
