"""tools/tokenize_vision.py when media are damaged, the disk is full, and processes are killed."""

import collections
import json
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.media import workers
from tests.architecture.source import ROOT
from tests.support.full_disk import no_file_beyond
from tests.support.processes import children_of, is_running
from tests.unit.vision.hanging import HangingDecoder
from tests.unit.vision.tokenized import contents, skipped, tree
from tools import tokenize_vision


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def test_pictures_of_every_kind(arguments, tmp_path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for name in ("plain.png", "animated.gif", "cmyk.jpg", "turned.jpg", "long.png"):
        (folder / name).with_suffix(".txt").write_text("A caption.")
    picture.save(folder / "plain.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(180)] * 2)
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif, quality=95)
    Image.new("RGB", (165, 32)).save(folder / "long.png")
    Image.new("RGB", (3, 3)).save(folder / "tiny.png")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:700])
    (folder / "text.webp").write_text("<html>404</html>")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "latin.png").write_bytes((folder / "plain.png").read_bytes())
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    tokenize_vision.main([*arguments, f"--inputs=[{folder}]", "--max_bad_fraction=1"])
    found = contents(tmp_path / "codes")
    assert list(found) == ["animated", "cmyk", "plain", "sixteen", "turned"]
    assert found["turned"][0].shape == (10, 8) and found["cmyk"][0].shape == (8, 10)
    assert found["animated"][0].shape == (8, 10)  # its first frame
    assert found["sixteen"][1]["captions"] == []
    reasons = skipped(tmp_path / "codes")
    assert reasons.pop("latin").startswith("its captions are unreadable: 'utf-8' codec can't decode byte 0xe9")
    assert "3600000000 pixels" in reasons["bomb"] and "truncated" in reasons["cut"]
    assert {key: reason.split(" (")[0] for key, reason in reasons.items()} == {
        "bomb": "not a readable picture",
        "cut": "not a readable picture",
        "empty": "two media files of one key: " + str(folder / "empty.jpg") + " is used",
        "long": "32x165 pixels: one side is more than 5 times the other",
        "text": "not a readable picture",
        "tiny": "3x3 pixels: each side must have at least 4",
    }


def test_killed_before_every_rename(arguments, media, tmp_path):
    """And started again: the bytes of an undisturbed run, where a sample loses its key to another at the end."""
    rows = [{"path": str(media / "a.png"), "key": key} for key in "bx"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [*arguments, "--shard_size=4", f"--inputs=[{media},{tmp_path}/rows.jsonl]"]
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    whole = tree(tmp_path / "whole")
    assert skipped(tmp_path / "whole")["b"] == "its key is also that of a sample in codes-00000-00000"
    program = [sys.executable, "-m", "tests.unit.vision.killed", str(tmp_path), *arguments]
    run = subprocess.run(program, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    moments = int(run.stdout.splitlines()[-1])
    assert moments == 1 + 3 * 2 + 2 + 2  # what it is made by; tar and record of three chunks, of one again; the end
    for moment in range(1, moments + 1):
        assert tree(tmp_path / str(moment)) != whole
        tokenize_vision.main([*arguments, f"--output={tmp_path / str(moment)}"])
        assert tree(tmp_path / str(moment)) == whole, moment


def test_a_sample_that_hangs_is_skipped(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_vision, "Decoder", HangingDecoder)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key in "abc":
        Image.new("RGB", (40, 32)).save(folder / f"{key}.png")
    hanging = [f"--inputs=[{folder}]", "--max_bad_fraction=1", "--decode_workers=2", "--worker_timeout_s=5"]
    tokenize_vision.main([*arguments, *hanging])
    assert list(contents(tmp_path / "codes")) == ["a", "c"]
    assert skipped(tmp_path / "codes") == {"b": "a process was not done with it after 5 s"}


def test_a_killed_program_leaves_no_worker(arguments, tmp_path):
    """Killed in the middle of decoding; the restart ends with the undisturbed bytes."""
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    listed = tmp_path / "pids"
    child = os.fork()
    if child == 0:

        def first_result(*_, **__):
            listed.write_text(" ".join(map(str, children_of(os.getpid()))))
            os.kill(os.getpid(), signal.SIGKILL)

        tokenize_vision.tokenize = first_result
        try:
            tokenize_vision.main([*arguments, "--decode_workers=2"])
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    pids = [int(pid) for pid in listed.read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tokenize_vision.main([*arguments, "--decode_workers=2"])
    assert tree(tmp_path / "codes") == tree(tmp_path / "whole")


def test_killed_workers_change_nothing(arguments, tmp_path, monkeypatch):
    """Both workers, and those that take their place, each in the middle of its work."""
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    apply, asked, killed = workers._Worker.apply, collections.Counter(), []

    def doomed(self, item, timeout_s):
        asked[self.process_id] += 1
        if asked[self.process_id] == 2 and len(killed) < 4:
            killed.append(self.process_id)
            os.kill(self.process_id, signal.SIGKILL)
        return apply(self, item, timeout_s)

    monkeypatch.setattr(workers._Worker, "apply", doomed)
    tokenize_vision.main([*arguments, "--decode_workers=2"])
    assert len(set(killed)) == 4
    assert tree(tmp_path / "codes") == tree(tmp_path / "whole")


@pytest.mark.parametrize("limit", [600, 4_000])
def test_a_full_disk(arguments, tmp_path, limit):
    """The system refuses to write more bytes into a file: the record of what it is made by; a shard."""
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    refusal = r"output: cannot write .* \(File too large\): make room"
    with no_file_beyond(limit), pytest.raises(InputError, match=refusal):
        tokenize_vision.main(arguments)
    assert not list((tmp_path / "codes").rglob("*.tmp"))
    tokenize_vision.main(arguments)
    assert tree(tmp_path / "codes") == tree(tmp_path / "whole")
