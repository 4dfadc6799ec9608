"""A decoder that hangs; a module of its own, which the processes that decode import in a moment."""

import time

from megatron_ext.media import Sample
from megatron_ext.media.decode import DecodedSample, Decoder


class HangingDecoder(Decoder):
    """Never ends with sample b."""

    def __call__(self, sample: Sample) -> DecodedSample:
        if sample.key == "b":
            time.sleep(600)
        return super().__call__(sample)
