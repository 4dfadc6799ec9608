"""tools/tokenize_vision.py: what is written, what is skipped, what is reused."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from megatron_ext import vocab
from megatron_ext.config import InputError
from megatron_ext.data.sources import MediaSample, TokenizedFolder
from megatron_ext.vision import from_uint8, load_vision_tokenizer, tokenize
from megatron_ext.vision.shards import Chunk, CodesFolder, TokenizedSample
from tests.unit.vision.tokenized import contents, skipped, tree
from tools import tokenize_vision


def test_codes_are_those_of_the_tokenizer(arguments, media, tokenizer, tmp_path, capsys):
    tokenize_vision.main(arguments)
    found = contents(tmp_path / "codes")
    assert list(found) == ["a", "b", "c", "e", "v"]
    model = load_vision_tokenizer(tokenizer)
    for key in "abc":
        pixels = from_uint8(np.asarray(Image.open(media / f"{key}.png")))[None]
        codes, fields = found[key]
        assert codes.dtype == np.uint16
        assert np.array_equal(codes, model.encode(pixels)[0].numpy())
        assert fields["kind"] == "image" and fields["captions"][0] == f"Picture {key}."
        assert fields["source"] == str(media / f"{key}.png") and len(fields["source_sha256"]) == 64
    assert found["a"][1]["captions"] == ["Picture a.", "图片"]
    assert found["e"][0].shape == (10, 10)
    codes, fields = found["v"]
    assert codes.shape == (2, 8, 8)
    assert (fields["kind"], fields["frame_rate_mhz"], fields["duration_ms"]) == ("video", 10_000, 800)
    manifest = json.loads((tmp_path / "codes/manifest.json").read_text())
    assert manifest["format_version"] == 1 and manifest["vision_tokenizer"] == model.identity
    assert (manifest["codebook_size"], manifest["spatial_factor"], manifest["temporal_factor"]) == (64, 4, 4)
    assert manifest["samples"] == {"image": 4, "video": 1}
    assert (manifest["skipped"], manifest["without_captions"]) == (1, 1)
    assert list(skipped(tmp_path / "codes")) == ["d"]
    assert "not a readable picture" in capsys.readouterr().out


def test_tars_give_the_codes_of_folders(arguments, media, tmp_path):
    tokenize_vision.main(arguments)
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        for path in sorted(media.iterdir()):
            tar.add(path, path.name)
    tokenize_vision.main([*arguments, f"--inputs=[{tmp_path / 'media.tar'}]", f"--output={tmp_path / 'from_tar'}"])
    folder, shard = contents(tmp_path / "codes"), contents(tmp_path / "from_tar")
    assert list(folder) == list(shard)
    assert all(np.array_equal(folder[key][0], shard[key][0]) for key in folder)


def test_a_name_that_is_not_utf8_is_spelt_in_the_key(arguments, media, tmp_path):
    os.rename(media / "b.png", os.fsencode(media / "b") + b"\xe9.png")
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        for path in sorted(media.iterdir()):
            tar.add(path, path.name)
    for source in (media, tmp_path / "media.tar"):
        output = tmp_path / f"codes_{source.name}"
        tokenize_vision.main([*arguments, f"--inputs=[{source}]", f"--output={output}"])
        found = contents(output)
        assert list(found) == ["a", "b\\xe9", "c", "e", "v"]
        assert found["b\\xe9"][1]["source"].endswith("b\\xe9.png") and found["b\\xe9"][1]["captions"] == []
        assert "b\\xe9" in {sample.key for sample in TokenizedFolder.open(output).samples()}


def test_waiting_pixels_are_bounded(arguments, tmp_path, monkeypatch):
    arguments = [*arguments, "--batch_size=8"]
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    # a and c (3,072 bytes each) and b (4,608) wait; e (4,800) is too much: a and c are the most. v alone is too much.
    monkeypatch.setattr(tokenize, "MAX_WAITING_BYTES", 12_000)
    encode, batches = tokenize._encode, []

    def recorded(batch, model):
        batches.append([decoded.sample.key for decoded in batch])
        return encode(batch, model)

    monkeypatch.setattr(tokenize, "_encode", recorded)
    tokenize_vision.main(arguments)
    assert batches == [["a", "c"], ["v"], ["b"], ["e"]]
    assert tree(tmp_path / "codes") == tree(tmp_path / "whole")


def test_a_caption_that_is_not_unicode_is_skipped_by_name(arguments, media, tmp_path):
    (media / "a.json").write_text('{"caption_zh": "half \\ud83d"}')
    tokenize_vision.main(arguments)
    reasons = skipped(tmp_path / "codes")
    assert list(reasons) == ["a", "d"] and "surrogates not allowed" in reasons["a"]


def test_too_many_bad_samples_stop_and_finished_work_stays(arguments, media, tmp_path, capsys):
    strict = [*arguments, "--shard_size=2", "--max_bad_fraction=0.16"]
    with pytest.raises(InputError, match=r"1 of 6 samples .* max_bad_fraction 0.16 \(.*d.jpg: not a readable picture"):
        tokenize_vision.main(strict)
    # How many samples there are is known when the last chunk is listed, before the one before it is written.
    shards = {f"codes-00000-0000{number}.tar" for number in range(2)}
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {*shards, "finished"}
    with pytest.raises(InputError, match="1 of [246] samples"):  # none is allowed: at once
        tokenize_vision.main([*strict, "--max_bad_fraction=0", f"--output={tmp_path / 'none'}"])
    assert len(list((tmp_path / "none").glob("*.tar"))) == 1
    lenient = [*strict, "--max_bad_fraction=0.17"]
    tokenize_vision.main(lenient)
    printed = capsys.readouterr().out
    assert "4 of 6 samples were done before" in printed
    assert f"skipped {media / 'd.jpg'}: not a readable picture" in printed
    with pytest.raises(InputError, match="1 of 6 samples"):  # of a finished folder too
        tokenize_vision.main(strict)


def test_what_listing_finds_unusable_counts_once(arguments, media, tmp_path):
    (media / "a.png").with_suffix(".webp").write_bytes(b"beside a.png")
    tokenize_vision.main([*arguments, "--max_bad_fraction=0.29"])  # 2 of 7
    assert set(skipped(tmp_path / "codes")) == {"a", "d"}


def test_preprocessing_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    picture, clip = rng.integers(0, 70_000, (2, 3)), rng.integers(0, 70_000, (4, 2, 3))
    folder = CodesFolder(tmp_path, {"vision_tokenizer": "0123", "codebook_size": 70_000})
    facts = {"source": "x", "source_sha256": "0" * 64}
    bee, dotted, clock = "sub/b", "sub.d/100%.v2", "v"  # a manifest's keys may have dots
    folder.write(
        Chunk(part=0, number=0, count=1, inputs_sha256="0"),
        [
            TokenizedSample(key=bee, kind="image", codes=picture, captions=("A bee.", "一只蜜蜂。"), **facts),
            TokenizedSample(key=dotted, kind="image", codes=picture, captions=("Two.",), **facts),
            TokenizedSample(
                key=clock, kind="video", codes=clip, captions=(), frame_rate_mhz=4000, duration_ms=3750, **facts
            ),
        ],
        [],
    )
    folder.complete(folder.records(1))
    assert list(TokenizedFolder.open(tmp_path).samples()) == [
        MediaSample(bee, vocab.Image(picture), ("A bee.", "一只蜜蜂。")),
        MediaSample(dotted, vocab.Image(picture), ("Two.",)),
        MediaSample(clock, vocab.Video(clip, 4000, 3750), ()),
    ]


def test_unchanged_work_is_reused_and_changed_work_is_refused(arguments, media, tmp_path, capsys):
    tokenize_vision.main(arguments)
    manifest = tmp_path / "codes/manifest.json"
    before = manifest.stat().st_mtime_ns
    tokenize_vision.main(arguments)
    assert "reused" in capsys.readouterr().out and manifest.stat().st_mtime_ns == before
    square = [*arguments, "--resize.rule=square", "--resize.size=16"]
    with pytest.raises(InputError, match="made with resize {.*}, this run has {.*'square'.*}: .* overwrite: true"):
        tokenize_vision.main(square)
    assert contents(tmp_path / "codes")["a"][0].shape == (8, 8)
    tokenize_vision.main([*square, "--overwrite=true"])
    assert contents(tmp_path / "codes")["a"][0].shape == (4, 4)
    (media / "e.png").unlink()
    tokenize_vision.main([*arguments, "--overwrite=true"])
    assert list(contents(tmp_path / "codes")) == ["a", "b", "c", "v"]
    (tmp_path / "codes/codes-00000-00000.tar").write_bytes(b"damaged")
    tokenize_vision.main(arguments)
    assert list(contents(tmp_path / "codes")) == ["a", "b", "c", "v"]


def test_interrupted_work_goes_on(arguments, tmp_path, monkeypatch, capsys):
    arguments = [*arguments, "--shard_size=2"]
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    original, calls = tokenize_vision.tokenize, []

    def interrupted(decoded, *rest, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(decoded, *rest, **options)

    monkeypatch.setattr(tokenize_vision, "tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_vision.main(arguments)
    assert not (tmp_path / "codes/manifest.json").exists()
    tokenize_vision.main(arguments)
    assert len(calls) == 4
    assert "2 of 6 samples were done before" in capsys.readouterr().out
    assert tree(tmp_path / "codes") == tree(tmp_path / "whole")


def test_wrong_options_are_refused(arguments, media):
    with pytest.raises(InputError, match="resize.size = 18"):
        tokenize_vision.main([*arguments, "--resize.rule=square", "--resize.size=18"])
    with pytest.raises(InputError, match="batch_size"):
        tokenize_vision.main([*arguments, "--batch_size=0"])
    for path in media.glob("[abcev].*"):
        path.unlink()
    with pytest.raises(InputError, match="none of the 1 samples"):
        tokenize_vision.main([*arguments, "--max_bad_fraction=1"])
