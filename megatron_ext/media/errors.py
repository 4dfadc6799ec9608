"""One unusable picture or clip among many."""

from megatron_ext.config import one_line


class MediaError(ValueError):
    """A sample cannot be used; the message says why, without naming it, in one line. Programs skip, count and name such
    samples."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))
