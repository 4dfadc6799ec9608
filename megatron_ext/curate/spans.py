"""Spans of time in equal parts."""


def cut_evenly(duration_s: float, whole_under_s: float) -> list[tuple[float, float]]:
    """(start, end) in seconds of equal pieces: the whole where it is shorter than `whole_under_s`, else as few as are
    shorter; each is then at least half as long."""
    count = int(duration_s // whole_under_s) + 1
    edges = [duration_s * number / count for number in range(count + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def evenly_spaced(start_s: float, end_s: float, count: int) -> list[float]:
    """The middles of `count` equal parts of a span of time, in seconds."""
    return [start_s + (number + 0.5) / count * (end_s - start_s) for number in range(count)]
