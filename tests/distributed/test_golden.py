"""200 steps of a tiny decoder are the ones in git, on any CPU; whoever changes them says why in CHANGELOG.md."""

from tests.distributed import golden
from tests.support.comparison import assert_same_history

# (first step, bound). Rounding differs between CPUs and BLAS libraries, and training amplifies it. Measured between
# SSE 4.2, AVX2 and AVX-512 kernels, relative: 2e-7 up to step 20, 7e-6 up to 60, 5e-4 up to 200 (and 5e-8 between
# torch 2.13 with megatron-core 0.16.1 and torch 2.11 with 0.19.2).
BOUNDS = ((0, 3e-6), (20, 1e-4), (60, 1e-2))


def test_the_steps_are_the_golden_ones():
    found, expected = golden.train(), golden.read()
    assert len(found) == len(expected) == golden.STEPS
    ends = [first for first, _ in BOUNDS[1:]] + [golden.STEPS]
    for (first, bound), end in zip(BOUNDS, ends, strict=True):
        assert_same_history(found[first:end], expected[first:end], bound)


def test_the_golden_steps_learn():
    first, *_, last = golden.read()
    assert first["loss"] > 4.5 and last["loss"] < 0.5


def test_a_change_of_the_golden_steps_is_explained():
    quoted = f"golden training `{golden.digest()}`"
    assert quoted in golden.CHANGELOG.read_text(encoding="utf-8"), (
        f"{golden.PATH.name} has changed: add a line to CHANGELOG.md that says why and holds {quoted}"
    )
