"""The loaders against plain Pillow and PyAV, and against each other."""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, build_index
from tokenizer_train.vision.config_media import MediaConfig
from tokenizer_train.vision.loader import choose_loader
from tokenizer_train.vision.loader_cpu import ByteCache, CpuLoader
from tokenizer_train.vision.loader_dali import DaliLoader
from tokenizer_train.vision.order import Draw

MEDIA = Path(__file__).parents[3] / "examples/media"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """JPEGs (one lying, one grey, one of four colours, two damaged), a PNG, clips in VP9, MJPEG and H.264."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("astronaut", "cat", "fig", "owl"):
        (folder / f"{name}.jpg").write_bytes((MEDIA / f"images/{name}.jpg").read_bytes())
    cat = Image.open(MEDIA / "images/cat.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    cat.crop((0, 0, 256, 160)).save(folder / "turned.jpg", exif=turned, quality=90)
    cat.convert("L").save(folder / "grey.jpg")
    cat.convert("CMYK").save(folder / "four_colours.jpg")
    cat.save(folder / "lossless.png")
    data = (folder / "cat.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    with av.open(str(MEDIA / "clips/rabbit.mp4")) as container:
        frames = list(container.decode(video=0))
    for name, codec, pixels in (("vp9.webm", "libvpx-vp9", "yuv420p"), ("mjpeg.avi", "mjpeg", "yuvj420p")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options={"cpu-used": "8"} if codec[0] == "l" else {})
            stream.height, stream.width, stream.pix_fmt, stream.gop_size = 192, 192, pixels, 12
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), "rgb24")))
            container.mux(stream.encode(None))
    (folder / "h264.mp4").write_bytes((MEDIA / "clips/rabbit.mp4").read_bytes())
    data = (folder / "vp9.webm").read_bytes()
    (folder / "ends_early.webm").write_bytes(data[: len(data) // 2])
    return build_index([str(folder)], None, lambda *_: contextlib.nullcontext(lambda count: None))


def number_of(index, key: str) -> int:
    return next(number for number in range(len(index)) if index[number].key == key)


def draw_of(index, key: str, size: int, **changes) -> Draw:
    """The largest centred square at `size`, of a clip some frames."""
    sample = number_of(index, key)
    height, width = int(index.height[sample]), int(index.width[sample])
    side = min(height, width)
    box = ((height - side) // 2, (width - side) // 2, side, side)
    frames = (1, 5, 9, 30) if index.is_clip[sample] else ()
    draw = Draw(sample=sample, box=box, is_mirrored=False, height=size, width=size, frames=frames)
    return replace(draw, **changes)


@pytest.fixture(scope="module")
def cpu(index) -> CpuLoader:
    return CpuLoader(index, smallest_scale=0.5, cache_bytes=10**8)


@pytest.fixture(scope="module")
def dali(index, cpu) -> DaliLoader:
    return DaliLoader(index, cpu, device_id=None, threads=1, largest_batch=8)


def by_pillow(index, draw: Draw) -> np.ndarray:
    """The oracle: everything as Pillow does it, from the whole picture."""
    picture = Image.open(io.BytesIO(index[draw.sample].media.read()))
    turns = {6: Image.Transpose.ROTATE_270}.get(picture.getexif().get(0x0112))
    picture = picture.convert("RGB")
    picture = picture.transpose(turns) if turns is not None else picture
    top, left, height, width = draw.box
    crop = picture.crop((left, top, left + width, top + height))
    crop = crop.resize((draw.width, draw.height), Image.Resampling.BICUBIC)
    return np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.is_mirrored else crop)


CROP = {"box": (31, 17, 101, 77), "is_mirrored": True, "height": 64, "width": 48}


@pytest.mark.parametrize("key", ["astronaut", "cat", "turned", "grey", "four_colours", "lossless"])
@pytest.mark.parametrize("changes", [{}, CROP, {"height": 300, "width": 300}], ids=["shrunk", "crop", "enlarged"])
def test_pictures_are_pillows(index, cpu, key, changes):
    draw = draw_of(index, key, 128, **changes)
    (found,) = cpu.decode([draw])
    difference = np.abs(found.numpy().astype(int) - by_pillow(index, draw))
    # Measured: 0.006 on average, 2 at most (the filters round their weights differently).
    assert difference.max() <= 3 and difference.mean() < 0.02


def test_large_jpegs_are_decoded_smaller(index):
    loader = CpuLoader(index, smallest_scale=1.0, cache_bytes=10**8)
    draw = draw_of(index, "astronaut", 32)
    assert loader._reduction(draw, 256, 256) == 2 and loader._reduction(draw_of(index, "astronaut", 48), 256, 256) == 1
    difference = np.abs(loader.decode([draw])[0].numpy().astype(int) - by_pillow(index, draw))
    # Measured over the 32 sample photographs: 0.24 on average, 0.45 in the worst, 7 at most.
    assert difference.mean() < 0.8
    crop = replace(draw, box=(20, 40, 128, 128))  # twice as large a scale: half of the gap
    difference = np.abs(loader.decode([crop])[0].numpy().astype(int) - by_pillow(index, crop))
    assert difference.mean() < 2.0, "the box is where it belongs in the reduced picture"


def test_clips_are_their_frames(index, cpu):
    draw = draw_of(index, "h264", 192)
    with av.open(io.BytesIO(index[draw.sample].media.read())) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (whole,) = cpu.decode([draw])
    assert np.array_equal(whole.numpy(), np.stack([frames[number] for number in draw.frames]))
    (crop,) = cpu.decode([replace(draw, **CROP)])
    for found, number in zip(crop.numpy(), draw.frames, strict=True):
        expected = Image.fromarray(frames[number]).crop((17, 31, 94, 132)).resize((48, 64), Image.Resampling.BICUBIC)
        assert np.abs(found.astype(int) - np.asarray(expected)[:, ::-1]).max() <= 1


def test_damaged_media_are_a_media_error_in_both_loaders(index, cpu, dali):
    keys = ["cat", "truncated", "owl"]
    for loader in (cpu, dali):
        first, damaged, last = loader.decode([draw_of(index, key, 64) for key in keys])
        assert isinstance(damaged, MediaError) and first.shape == last.shape == (64, 64, 3)
        good, short = loader.decode([draw_of(index, key, 64) for key in ("vp9", "ends_early")])
        assert isinstance(short, MediaError) and good.shape == (4, 64, 64, 3)
        (again,) = loader.decode([draw_of(index, "cat", 64)])
        assert torch.equal(again, loader.decode([draw_of(index, "cat", 64)])[0]), "the loader lives on"


# Without augmentation, at the picture's size and shrunk; mean and largest difference of levels, measured:
# JPEG 0.20 and 5; shrunk 0.18 and 5 (DALI's libjpeg-turbo rounds differently);
# VP9 1.45 and 30, MJPEG 1.09 and 26; shrunk 1.2 and 10, 0.8 and 7 (chroma is brought to full size by another filter).
BOUNDS = {"jpeg": (0.5, 12), "clip": (2.5, 48)}


@pytest.mark.parametrize("changes", [{}, CROP], ids=["whole", "crop"])
@pytest.mark.parametrize(("kind", "keys"), [
    ("jpeg", ["astronaut", "cat", "fig", "owl", "turned", "grey"]), ("clip", ["vp9", "mjpeg"])
])  # fmt: skip
@pytest.mark.parametrize("size", [256, 128])
def test_dali_decodes_what_the_cpu_loader_decodes(index, cpu, dali, kind, keys, size, changes, monkeypatch):
    draws = [draw_of(index, key, min(size, 192) if kind == "clip" else size, **changes) for key in keys]
    expected = cpu.decode(draws)
    monkeypatch.setattr(dali, "_cpu", None)  # nothing may be left to the CPU loader
    mean, most = BOUNDS[kind]
    for key, one, other in zip(keys, dali.decode(draws), expected, strict=True):
        difference = (one.int() - other.int()).abs()
        assert one.shape == other.shape and difference.float().mean() < mean and difference.max() <= most, key


def test_a_batch_stays_when_the_next_is_decoded(index, dali):
    first = dali.decode([draw_of(index, key, 64) for key in ("cat", "owl")])
    before = [frame.clone() for frame in first]
    dali.decode([draw_of(index, key, 64) for key in ("fig", "astronaut")])
    assert all(torch.equal(one, other) for one, other in zip(first, before, strict=True))


def test_what_dali_does_not_decode_goes_to_the_cpu_loader(index, cpu, dali):
    for key in ("four_colours", "lossless", "h264"):
        assert torch.equal(dali.decode([draw_of(index, key, 64)])[0], cpu.decode([draw_of(index, key, 64)])[0])


def test_the_loader_is_the_one_asked_for(index, monkeypatch):
    config, device = MediaConfig(inputs=["x"]), torch.device("cpu")

    def choose(name: str):
        return choose_loader(replace(config, loader=name), index, device=device, largest_batch=4)[0]

    assert [choose(name).name for name in ("auto", "cpu", "dali")] == ["cpu", "cpu", "dali"]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "tokenizer_train.vision.loader_dali")
    assert choose("auto").name == "cpu"
    with pytest.raises(InputError, match="media.loader = 'dali': .*pip install"):
        choose("dali")


def test_the_cache_keeps_to_its_bytes():
    cache, made = ByteCache(100), []

    def get(key: int, size: int) -> None:
        cache.get(key, lambda: made.append(key) or np.zeros(size, dtype=np.uint8))

    for key, size in ((1, 40), (2, 40), (1, 40), (3, 40), (1, 40), (2, 40), (4, 200), (4, 200), (2, 40)):
        get(key, size)
    assert made == [1, 2, 3, 2, 4, 4]
