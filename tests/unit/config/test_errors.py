"""Messages that quote a library: one line, as a terminal shows it, cut between words."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import BadSamples, InputError, one_line, reason_of, run_program
from megatron_ext.media import MediaError
from megatron_ext.vocab import DocumentError

RAW = "\x1b[1;31mtwo\x1b[0m lines\r\n\tof \x1b]8;;http://x\x07words\x1b]8;;\x07\x00\x9b2K,\u2028 three  blanks\x1b"
CLEAN = "two lines of words, three  blanks"


def test_one_line():
    assert one_line(RAW) == CLEAN
    assert one_line("\x1b]no end of a title") == "no end of a title"  # what follows is not lost
    assert one_line("一只狐狸 🦊 é\ttab") == "一只狐狸 🦊 é\ttab"


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters() | st.sampled_from("\x1b[]m\n\r\x9b;8\\")))
def test_no_text_breaks_the_line(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1 and not any(ord(c) < 32 and c != "\t" or 127 <= ord(c) < 160 for c in line)
    assert one_line(line) == line


def test_every_message_is_one_line(capsys):
    for error in (InputError(RAW), MediaError(RAW)):
        assert str(error) == CLEAN and str(pickle.loads(pickle.dumps(error))) == CLEAN
    assert str(DocumentError(3, RAW)) == f"not a document at position 3: {CLEAN}"
    bad = BadSamples(1.0)
    bad.add("a\nb.jpg", RAW)
    assert bad.lines() == [f"skipped a b.jpg: {CLEAN}"]

    def fails(argv):
        raise InputError(f"file x: {RAW}")

    with pytest.raises(SystemExit):
        run_program(fails, [])
    assert capsys.readouterr().err == f"error: file x: {CLEAN}\n"


def test_a_reason_ends_with_a_word():
    assert reason_of(ValueError("a" * 10 + " bcd" * 100), 30) == "aaaaaaaaaa bcd bcd bcd bcd bcd ..."
    assert (
        reason_of(ValueError("12345 6789"), 10) == "12345 6789"
        and reason_of(ValueError("12345 67890"), 10) == "12345 ..."
    )
    assert reason_of(ValueError("x" * 400), 10) == "xxxxxxxxxx ..."
    assert reason_of(KeyError()) == "KeyError" and reason_of(ValueError(" \n")) == "ValueError"
    assert reason_of(FileNotFoundError(2, "No such file or directory", "/x")) == "No such file or directory"
    assert reason_of(OSError("cannot  identify\nimage")) == "cannot identify image"
    assert reason_of(RAW) == "two lines of words, three blanks"


class Callback:
    """What a Lightning checkpoint holds beside tensors."""


def test_what_torch_found_in_a_checkpoint(tmp_path):
    """Not its advice to run what the file holds."""
    torch.save({"state_dict": {}, "callbacks": {Callback: 1}}, tmp_path / "old.ckpt")
    with pytest.raises(pickle.UnpicklingError) as found:
        torch.load(tmp_path / "old.ckpt", weights_only=True)
    assert "\x1b" in str(found.value) and "\n" in str(found.value)
    name = f"{Callback.__module__}.Callback"
    assert reason_of(found.value) == f"Unsupported global: GLOBAL {name} was not an allowed global by default"
