"""The real detector on drawn text and on photographs."""

import numpy as np

from megatron_ext.curate.text import text_share
from megatron_ext.media import decode_picture
from tests.unit.curate.drawn import lines
from tests.unit.curate.test_colour import PHOTOGRAPHS


def test_text_counts_by_its_area():
    """A line is 330 x 24 of 512 x 512 pixels, 0.030 of the area; boxes are a little wider than the ink."""
    shares = [text_share(lines(count), 512) for count in (0, 1, 5)]
    assert shares[0] == 0 and 0.025 < shares[1] < 0.05 and 0.15 < shares[2] < 0.25  # measured: 0.034, 0.193
    assert abs(text_share(lines(5), 256) - shares[2]) < 0.03  # measured: 0.013


def test_textures_are_no_text():
    """Without the bound on the height of a line the detector covers these photographs nearly whole."""
    named = {path.stem: path for path in PHOTOGRAPHS}
    for name in ("macaw", "coffee", "pisa"):
        assert text_share(decode_picture(named[name].read_bytes()), 512) == 0


def test_small_and_narrow_pictures():
    assert text_share(np.zeros((20, 700, 3), dtype=np.uint8), 512) == 0
