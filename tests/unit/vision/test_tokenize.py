"""tools/tokenize_vision.py: what is written, what is skipped, what is reused."""

import io
import json
import os
import tarfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext import vocab
from megatron_ext.config import InputError
from megatron_ext.data.sources import MediaSample, TokenizedFolder
from megatron_ext.vision import (
    MoVQGAN,
    VisionTokenizerConfig,
    from_uint8,
    load_vision_tokenizer,
    save_vision_tokenizer,
    tokenize,
)
from megatron_ext.vision.shards import ShardWriter, TokenizedSample
from tools import tokenize_vision

TINY = VisionTokenizerConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(2,))


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    model = MoVQGAN(TINY).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(2, 3, 16, 16) * 2 - 1)
        model.quantize.embedding.weight.normal_().mul_(latents.std()).add_(latents.mean())
    save_vision_tokenizer(model, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    random = np.random.default_rng(0)
    for key, size in {"a": (32, 32), "b": (32, 48), "c": (32, 32), "e": (40, 40)}.items():
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(f"Picture {key}.")
    (folder / "a.json").write_text(json.dumps({"caption_zh": "图片"}), encoding="utf-8")
    (folder / "d.jpg").write_bytes(b"damaged")
    with av.open(str(folder / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "bgr0"
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture
def arguments(media, tokenizer, tmp_path):
    return [
        f"--inputs=[{media}]",
        f"--tokenizer={tokenizer}",
        f"--output={tmp_path / 'codes'}",
        "--resize.min_pixels=1024",
        "--resize.max_pixels=2048",
        "--batch_size=2",
        "--max_bad_fraction=0.4",
        "--device=cpu",
    ]


def contents(folder):
    """All samples of the shards: key -> (codes, fields)."""
    found = {}
    for name in sorted(folder.glob("*.tar")):
        with tarfile.open(name) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for file, content in files.items():
            if file.endswith(".json"):
                key = file.removesuffix(".json")
                found[key] = (np.load(io.BytesIO(files[f"{key}.codes.npy"])), json.loads(content))
    return found


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
    assert [item["key"] for item in manifest["skipped"]] == ["d"]
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


def test_a_name_that_is_not_utf8_is_skipped_and_named(arguments, media, tmp_path, capsys):
    os.rename(media / "b.png", os.fsencode(media / "b") + b"\xe9.png")
    with tarfile.open(tmp_path / "media.tar", "w") as tar:
        for path in sorted(media.iterdir()):
            tar.add(path, path.name)
    for source in (media, tmp_path / "media.tar"):
        output = tmp_path / f"codes_{source.name}"
        tokenize_vision.main([*arguments, f"--inputs=[{source}]", f"--output={output}"])
        assert list(contents(output)) == ["a", "c", "e", "v"]
        skipped = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["skipped"]
        assert [item["key"] for item in skipped] == ["b\\xe9", "d"]
        assert "name is not UTF-8" in skipped[0]["reason"] and skipped[0]["source"].endswith("b\\xe9.png")
        printed = capsys.readouterr().out
        assert printed.count("skipped ") == 2 and "b\\xe9.png: its name is not UTF-8" in printed


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
    for name in ("codes-00000.tar", "manifest.json"):
        assert (tmp_path / "codes" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_caption_that_is_not_unicode_is_skipped_by_name(arguments, media, tmp_path):
    (media / "a.json").write_text('{"caption_zh": "half \\ud83d"}')
    tokenize_vision.main(arguments)
    skipped = json.loads((tmp_path / "codes/manifest.json").read_text())["skipped"]
    assert [item["key"] for item in skipped] == ["a", "d"] and "surrogates not allowed" in skipped[0]["reason"]


def test_too_many_bad_samples_stop_and_the_work_before_them_stays(arguments, media, tmp_path, capsys):
    strict = [*arguments, "--shard_size=2", "--max_bad_fraction=0.16"]
    with pytest.raises(InputError, match=r"1 of 6 samples .* max_bad_fraction 0.16 \(.*d.jpg: not a readable picture"):
        tokenize_vision.main(strict)
    assert {path.name for path in (tmp_path / "codes").iterdir()} == {"codes-00000.tar", "manifest.partial.json"}
    lenient = [*strict, "--max_bad_fraction=0.17"]
    tokenize_vision.main(lenient)
    printed = capsys.readouterr().out
    assert "2 of 6 samples were done before" in printed
    assert f"skipped {media / 'd.jpg'}: not a readable picture" in printed
    with pytest.raises(InputError, match="1 of 6 samples"):  # of a finished folder too
        tokenize_vision.main(strict)


def test_preprocessing_reads_what_is_written(tmp_path):
    rng = np.random.default_rng(0)
    picture, clip = rng.integers(0, 70_000, (2, 3)), rng.integers(0, 70_000, (4, 2, 3))
    writer = ShardWriter(tmp_path, {"vision_tokenizer": "0123", "codebook_size": 70_000})
    facts = {"source": "x", "source_sha256": "0" * 64}
    writer.write(
        [
            TokenizedSample(key="sub/b", kind="image", codes=picture, captions=("A bee.", "一只蜜蜂。"), **facts),
            TokenizedSample(
                key="v", kind="video", codes=clip, captions=(), frame_rate_mhz=4000, duration_ms=3750, **facts
            ),
        ],
        [],
        2,
    )
    writer.finish()
    assert list(TokenizedFolder.open(tmp_path).samples()) == [
        MediaSample("sub/b", vocab.Image(picture), ("A bee.", "一只蜜蜂。")),
        MediaSample("v", vocab.Video(clip, 4000, 3750), ()),
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
    (tmp_path / "codes/codes-00000.tar").write_bytes(b"damaged")
    tokenize_vision.main(arguments)
    assert list(contents(tmp_path / "codes")) == ["a", "b", "c", "v"]


def test_interrupted_work_goes_on(arguments, tmp_path, monkeypatch, capsys):
    arguments = [*arguments, "--shard_size=2"]
    tokenize_vision.main([*arguments, f"--output={tmp_path / 'whole'}"])
    original, calls = tokenize_vision.tokenize, []

    def interrupted(block, *rest, **options):
        calls.append([sample.key for sample in block])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(block, *rest, **options)

    monkeypatch.setattr(tokenize_vision, "tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_vision.main(arguments)
    assert not (tmp_path / "codes/manifest.json").exists()
    tokenize_vision.main(arguments)
    assert calls == [["a", "b"], ["c", "d"], ["c", "d"], ["e", "v"]]
    assert "2 of 6 samples were done before" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "codes").iterdir())
    assert names == ["codes-00000.tar", "codes-00001.tar", "codes-00002.tar", "manifest.json"]
    for name in names:
        assert (tmp_path / "codes" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_wrong_options_are_refused(arguments, media):
    with pytest.raises(InputError, match="resize.size = 18"):
        tokenize_vision.main([*arguments, "--resize.rule=square", "--resize.size=18"])
    with pytest.raises(InputError, match="batch_size"):
        tokenize_vision.main([*arguments, "--batch_size=0"])
    for path in media.glob("[abcev].*"):
        path.unlink()
    with pytest.raises(InputError, match="none of the 1 samples"):
        tokenize_vision.main([*arguments, "--max_bad_fraction=1"])
