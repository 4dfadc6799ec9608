"""One unusable picture or clip among many."""


class MediaError(ValueError):
    """A sample cannot be used; the message says why, without naming it. Programs skip, count and name such samples."""
