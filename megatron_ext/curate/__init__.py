"""Curation: filters that judge pictures and clips, the table of their verdicts, and its report.

A filter is a pure function that returns a `Judgement`; a program asks one after the other and writes a row for every
input. What needs torch, an OCR model or a plotting library is imported where it is used: decoding processes need none
of them.
"""

from megatron_ext.curate.verdict import (
    DROPPED,
    KEPT,
    UNREADABLE,
    Judgement,
    Verdict,
    at_least,
    at_most,
    verdict_of,
    within,
)

__all__ = ["DROPPED", "KEPT", "UNREADABLE", "Judgement", "Verdict", "at_least", "at_most", "verdict_of", "within"]
