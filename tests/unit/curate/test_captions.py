"""Captions: what is shown of a clip, and a real server that misbehaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.curate.captions import ShownConfig, pieces_of, question
from megatron_ext.curate.spans import cut_evenly, evenly_spaced
from megatron_ext.media import list_samples
from tests.support.chat_server import MODEL, chat_server
from tools import caption

MEDIA = Path(__file__).parents[3] / "examples" / "media"


@given(st.floats(0.01, 1e5))
def test_pieces_are_the_paper_s(duration):
    pieces = cut_evenly(duration, 20.0)
    assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]
    assert pieces[0][0] == 0 and pieces[-1][1] == pytest.approx(duration)
    if duration < 20:
        assert len(pieces) == 1
    else:
        assert all(10 - 1e-6 <= end - start < 20 + 1e-6 for start, end in pieces)


def test_frames_are_evenly_spaced():
    times = evenly_spaced(10, 22, 12)
    assert times == pytest.approx([10.5 + second for second in range(12)])
    (clip,) = list_samples([MEDIA / "clips" / "tree_hand.mp4"])  # 24 frames, 8 per second, stamps of 1/16384 s
    (piece,) = pieces_of(clip, ShownConfig())
    assert piece.stamps == tuple(2048 * number for number in range(1, 24, 2))
    # Cut at 2 seconds, a clip of 3 seconds has two pieces, whose frames are each other's neighbours.
    first, second = pieces_of(clip, ShownConfig(whole_under_s=2.0))
    assert (first.start_s, first.end_s, second.start_s, second.end_s) == (0, 1.5, 1.5, 3)
    assert first.stamps == tuple(2048 * number for number in range(12))
    assert second.stamps == tuple(2048 * number for number in range(12, 24))
    # Fewer frames than asked for: each once.
    assert len(pieces_of(clip, ShownConfig(num_frames=100))[0].stamps) == 24


def test_a_question_holds_the_frames():
    (clip,) = list_samples([MEDIA / "clips" / "rabbit.mp4"])
    shown = ShownConfig(frame_edge=96)
    content = question(clip, pieces_of(clip, shown)[0], shown)
    assert [part["type"] for part in content] == ["image_url"] * 12 + ["text"]
    assert content[-1]["text"] == shown.clip_prompt
    assert all(part["image_url"]["url"].startswith("data:image/jpeg;base64,") for part in content[:-1])


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures, 40 to 51 pixels wide, each of its own colour."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (40 + number, 30), (10 * number, 100, 50)).save(folder / f"p{number:02d}.png")
    return folder


def options(inputs: Path, output: Path, url: str, **more: object) -> list[str]:
    given = {"server.model": MODEL, "server.backoff_s": 0.01, "server.timeout_s": 20, **more}
    return [
        f"--inputs=['{inputs}']",
        f"--output={output}",
        f"--server.base_url={url}",
        *(f"--{k}={v}" for k, v in given.items()),
    ]


def captions_in(output: Path, stem: str = "captions-00000-of-00001") -> dict[str, dict]:
    lines = (output / f"{stem}.jsonl").read_text().splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def colour_in(text: str) -> np.ndarray:
    return np.array(eval(text.partition("(")[2].rstrip(")")))


def test_every_passing_fault_is_overcome(tmp_path, pictures, capsys):
    faults = ["500", "429", "503", "broken", "drop", "half", "drip", "html", "nothing"]
    with chat_server(tmp_path, first=faults) as asked:
        started = time.monotonic()
        caption.main(options(pictures, tmp_path / "out", asked.url, **{"server.timeout_s": 3}))
        seconds = time.monotonic() - started
        requests = asked.requests()
    assert sorted(request["fault"] for request in requests) == sorted(faults + [""] * 12)
    records = captions_in(tmp_path / "out")
    assert list(records) == [f"p{number:02d}" for number in range(12)], "in the order of the inputs"
    for number, record in enumerate(records.values()):
        (text,) = record["captions"]
        assert text.startswith(f"1 pictures, {40 + number}x30, ")
        assert np.abs(colour_in(text) - (10 * number, 100, 50)).max() <= 2  # JPEG
        assert record["kind"] == "image" and record["source"].endswith(f"p{number:02d}.png")
    # The result is itself an input, with captions.
    again = list_samples([tmp_path / "out" / "captions-00000-of-00001.jsonl"])
    assert [(sample.key, list(sample.captions())) for sample in again] == [
        (key, record["captions"]) for key, record in records.items()
    ]
    assert again[3].media.read() == (pictures / "p03.png").read_bytes()
    output = capsys.readouterr().out
    for fault in ("HTTP 500", "HTTP 429", "HTTP 503", "no answer within 3 s", "no connection, or it was lost"):
        assert f"times: {fault}" in output
    assert "asked again 3 times: not the protocol's JSON" in output
    assert "12 of 12 samples have captions" in output
    assert 3 < seconds < 9, "three seconds for the answer that drips, not the ten that it takes"


def test_a_busy_server_is_given_the_time_it_asks_for(tmp_path, pictures):
    with chat_server(tmp_path, first=["429"]) as asked:
        started = time.monotonic()
        caption.main(options(pictures / "p00.png", tmp_path / "out", asked.url))
    assert time.monotonic() - started > 0.3, "Retry-After"


def test_unusable_answers_are_named_counted_and_asked_again(tmp_path, pictures, capsys):
    always = {"41": "empty", "42": "length", "43": "refusal", "44": "surrogate", "45": "400", "46": "500"}
    (pictures / "p11.png").write_bytes(b"no picture")
    reasons = {
        "p01": "an empty answer",
        "p02": "cut at server.max_tokens",
        "p03": "the model refused",
        "p04": "not Unicode: a lone surrogate",
        "p05": "the server refuses it: HTTP 400",
        "p06": "HTTP 500, 2 times",
        "p11": "not a readable picture",
    }
    more = {"server.attempts": 2, "max_bad_fraction": 1}
    with chat_server(tmp_path, always=always) as asked:
        with pytest.raises(InputError, match="of 12 samples cannot be used, more than max_bad_fraction 0.1"):
            caption.main(options(pictures, tmp_path / "out", asked.url, **{**more, "max_bad_fraction": 0.1}))
        assert not (tmp_path / "out" / "captions-00000-of-00001.jsonl").exists()
        caption.main(options(pictures, tmp_path / "out", asked.url, **more))
        asked_once = len(asked.requests())
        output = capsys.readouterr().out
        for key, reason in reasons.items():
            assert f"skipped {pictures / key}.png: {reason}" in output
        assert "without captions, 1 samples: an empty answer" in output
        assert list(captions_in(tmp_path / "out")) == ["p00", "p07", "p08", "p09", "p10"]
        (pictures / "p11.png").write_bytes((pictures / "p00.png").read_bytes())
        caption.main(options(pictures, tmp_path / "out", asked.url, **more))
        again = [request["width"] for request in asked.requests()[asked_once:]]
    assert sorted(set(again)) == [40, 41, 42, 43, 44, 45, 46], "those without an answer and the repaired file"
    assert "p11" in captions_in(tmp_path / "out")


@pytest.mark.parametrize("fault", ["401", "404"])
def test_what_every_question_would_meet_stops_at_once(tmp_path, pictures, fault):
    always = {str(40 + number): fault for number in range(12)}
    with chat_server(tmp_path, always=always) as asked:
        with pytest.raises(InputError, match=f"HTTP {fault} for model 'captioner' .*correct server.base_url"):
            caption.main(options(pictures, tmp_path / "out", asked.url))


def test_a_server_that_is_gone_stops_the_program(tmp_path, pictures):
    more = {"server.attempts": 2, "server.concurrency": 4, "max_bad_fraction": 1}
    with pytest.raises(InputError, match="8 questions in a row failed at 2 attempts each .*no connection, or"):
        caption.main(options(pictures, tmp_path / "out", "http://127.0.0.1:9/v1", **more))


def test_clips_in_pieces_and_shards(tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(MEDIA / "clips", clips)
    with chat_server(tmp_path) as asked:
        url = asked.url
        caption.main(options(clips, tmp_path / "one", url, **{"shown.whole_under_s": 2, "shown.frame_edge": 64}))
        assert sorted(request["pictures"] for request in asked.requests()) == [12, 12, 12]
        assert {request["width"] for request in asked.requests()} == {64}
        assert {request["prompt"] for request in asked.requests()} == {ShownConfig().clip_prompt}
        records = captions_in(tmp_path / "one")
        assert [
            (piece["start_s"], piece["end_s"], piece["num_frames"]) for piece in records["tree_hand"]["pieces"]
        ] == [
            (0, 1.5, 12),
            (1.5, 3, 12),
        ]
        assert records["tree_hand"]["captions"] == [], "no caption of a part describes the whole"
        assert records["rabbit"]["captions"] == [records["rabbit"]["pieces"][0]["caption"]]
        for shard in range(3):
            more = {"shown.whole_under_s": 2, "shown.frame_edge": 64, "shard_index": shard, "num_shards": 3}
            caption.main(options(clips, tmp_path / "three", url, **more))
    shards = sorted((tmp_path / "three").glob("captions-0000?-of-00003.jsonl"))
    merged = b"".join(path.read_bytes() for path in shards)
    assert len(shards) == 3 and merged == (tmp_path / "one" / "captions-00000-of-00001.jsonl").read_bytes()


def test_a_clip_without_answers_about_its_pieces_is_one_bad_sample(tmp_path, capsys):
    more = {"shown.whole_under_s": 2, "shown.frame_edge": 64, "server.attempts": 1, "max_bad_fraction": 1}
    with chat_server(tmp_path, always={"64": "400"}) as asked:
        caption.main(options(MEDIA / "clips", tmp_path / "out", asked.url, **more))
        assert len(asked.requests()) == 3
    assert sum(line.startswith("skipped ") for line in capsys.readouterr().out.splitlines()) == 2


def test_started_again_it_asks_about_what_changed_only(tmp_path, pictures, capsys):
    with chat_server(tmp_path) as asked:
        arguments = options(pictures, tmp_path / "out", asked.url)
        caption.main(arguments)
        first = (tmp_path / "out" / "captions-00000-of-00001.jsonl").stat()
        caption.main(arguments)
        assert "finished before, nothing has changed" in capsys.readouterr().out
        assert len(asked.requests()) == 12
        assert (tmp_path / "out" / "captions-00000-of-00001.jsonl").stat().st_mtime_ns == first.st_mtime_ns
        Image.new("RGB", (77, 30)).save(pictures / "p03.png")
        (pictures / "p05.png").unlink()
        caption.main(arguments)
        assert [request["width"] for request in asked.requests()[12:]] == [77]
        assert list(captions_in(tmp_path / "out")) == [f"p{number:02d}" for number in range(12) if number != 5]
        with pytest.raises(InputError, match="made with max_tokens 512, this run has 64: .*overwrite"):
            caption.main([*arguments, "--server.max_tokens=64"])
        caption.main([*arguments, "--server.max_tokens=64", "--overwrite=true"])
        assert len(asked.requests()) == 13 + 11


def test_what_cannot_be_listed_is_named(tmp_path, pictures, capsys):
    (pictures / "p03.jpg").write_bytes(b"another")
    shutil.copytree(pictures, tmp_path / "more")
    with chat_server(tmp_path) as asked:
        arguments = options(pictures, tmp_path / "out", asked.url, max_bad_fraction=1)
        caption.main([*arguments, f"--inputs=['{pictures}', '{tmp_path / 'more' / 'p00.png'}']"])
        assert len(asked.requests()) == 11
    output = capsys.readouterr().out
    assert "two media files of one key" in output
    assert f"skipped {tmp_path / 'more' / 'p00.png'}: its key p00 is that of {pictures / 'p00.png'}" in output


def test_a_torn_line_is_asked_again_and_a_strange_file_is_refused(tmp_path, pictures):
    with chat_server(tmp_path) as asked:
        arguments = options(pictures, tmp_path / "out", asked.url)
        caption.main(arguments)
        result = tmp_path / "out" / "captions-00000-of-00001.jsonl"
        whole = result.read_bytes()
        journal = result.with_suffix(".answers.jsonl")
        result.unlink()
        journal.write_bytes(journal.read_bytes()[:-7])
        caption.main(arguments)
        assert len(asked.requests()) == 13 and result.read_bytes() == whole
        journal.write_text("{}\nno journal\n")
        with pytest.raises(InputError, match="answers.jsonl:2 is no line of a journal"):
            caption.main(arguments)


@pytest.mark.slow
def test_killed_in_the_middle_it_loses_only_what_was_in_flight(tmp_path, pictures):
    in_flight = 2
    with chat_server(tmp_path, seconds=0.15) as asked:
        more = {"server.concurrency": in_flight}
        arguments = options(pictures, tmp_path / "out", asked.url, **more)
        journal = tmp_path / "out" / "captions-00000-of-00001.answers.jsonl"
        process = subprocess.Popen([sys.executable, "-m", "tools.caption", *arguments], cwd=MEDIA.parents[1])
        while not journal.exists() or journal.read_bytes().count(b"\n") < 6:  # the settings and five answers
            assert process.poll() is None
            time.sleep(0.01)
        # Nobody else may write meanwhile. Stopped, it holds its folder and does not come to its end.
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(InputError, match="another process writes"):
            caption.main(arguments)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # what was in flight is logged by then
        kept = journal.read_bytes().count(b"\n") - 1
        before = len(asked.requests())
        assert 5 <= kept < 12 and before - kept <= in_flight
        caption.main(arguments)
        assert len(asked.requests()) - before == 12 - kept
    assert len(captions_in(tmp_path / "out")) == 12
