"""Headers, the index of inputs and what it keeps, single frames of clips, glob patterns."""

import contextlib
import io
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import av
import av.bitstream
import numpy as np
import pytest
from PIL import Image

from megatron_ext.config import InputError
from megatron_ext.media import MediaError, build_index, decode_clip, decode_frames, decode_picture, list_samples
from megatron_ext.media.headers import Header, read_header
from megatron_ext.media.index import MediaIndex
from megatron_ext.media.listing import expand
from megatron_ext.media.names import Names
from megatron_ext.media.samples import Extent, Sample
from megatron_ext.media.table import MediaTable

MEDIA = Path(__file__).parents[3] / "examples/media"


def silent(label: str, total: int, unit: str):
    return contextlib.nullcontext(lambda count: None)


def write_clip(path: Path, codec: str, frames: list[np.ndarray], **options) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = 10
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    with av.open(str(MEDIA / "clips/rabbit.mp4")) as container:
        return [np.ascontiguousarray(f.to_ndarray(format="rgb24")[:64, :96]) for f in container.decode(video=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, frames) -> Path:
    """Pictures in every format, also turned ones, and clips whose containers say how long they are or do not."""
    folder = tmp_path_factory.mktemp("media")
    picture = Image.open(MEDIA / "images/cat.jpg").crop((0, 0, 200, 120))
    turned = Image.Exif()
    turned[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "tif"):
        picture.save(folder / f"plain_{suffix}.{suffix}")
        picture.save(folder / f"turned_{suffix}.{suffix}", exif=turned)
    picture.convert("CMYK").save(folder / "four_colours.jpg")
    write_clip(folder / "vp9.webm", "libvpx-vp9", frames, **{"cpu-used": "8", "deadline": "realtime"})
    write_clip(folder / "mjpeg.avi", "mjpeg", frames)
    write_clip(folder / "h264.mp4", "libx264", frames, preset="veryfast", bf="2")
    # Sought by the time of decoding, and its frames are stored in another order than shown.
    write_clip(folder / "mpeg4.avi", "mpeg4", frames, bf="2")
    return folder


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for item in sorted(folder.iterdir()):
            tar.add(item, arcname=item.name)
    return path


def all_frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_headers_say_what_decoding_finds(folder):
    for sample in list_samples([folder]):
        header, data = read_header(sample), sample.media.read()
        if sample.kind == "image":
            assert (header.height, header.width, 3) == decode_picture(data).shape, sample.source
        else:
            decoded = all_frames(data)
            assert (header.num_frames, header.height, header.width) == decoded.shape[:3], sample.source
            assert header.frame_rate == 25
    codecs = {sample.key: read_header(sample).codec for sample in list_samples([folder])}
    assert codecs["vp9"] == "vp9" and codecs["plain_jpg"] == "jpeg" and codecs["four_colours"] == "jpeg-other"


def test_a_folder_and_a_tar_have_the_same_index(folder, tmp_path):
    tar = pack(folder, tmp_path / "shard.tar")
    one, other = (build_index([str(path)], None, silent) for path in (folder, tar))
    assert len(one) == len(other) == len(list(folder.iterdir()))
    for number in range(len(one)):
        assert one[number].media.read() == other[number].media.read()
        assert one.codec(number) == other.codec(number)
    for column in ("is_clip", "height", "width", "num_frames", "frame_rate"):
        assert np.array_equal(getattr(one, column), getattr(other, column)), column


def test_samples_of_an_index_are_those_that_listing_finds(folder, tmp_path):
    below = tmp_path / "media/a.b"
    below.mkdir(parents=True)
    for name in ("one.jpg", "two.more.png", "three%2Ejpg.jpg", os.fsdecode(b"caf\xe9.jpg"), "größe.png"):
        shutil.copy(folder / f"plain_{name[-3:]}.{name[-3:]}", below / name)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(below, arcname="./a.b")
    for given in (below.parent, tmp_path / "shard.tar", below / "two.more.png"):
        index = build_index([str(given)], None, silent)
        listed = list_samples([given])
        assert len(index) == len(listed) == (1 if given.is_file() and given.suffix == ".png" else 5)
        assert [(s.key, s.source, s.media, s.kind) for s in listed] == [
            (s.key, s.source, s.media, s.kind) for s in map(index.__getitem__, range(len(index)))
        ]
    with pytest.raises(IndexError):
        index[1]


def test_names_are_what_went_in():
    texts = ["", "a/b.jpg", "größe", os.fsdecode(b"caf\xe9"), ""]
    names = Names.joined([Names.of(texts[:2]), Names.of([]), Names.of(texts[2:])])
    assert list(names) == texts and names[-2] == texts[-2] and names[1:3] == texts[1:3]
    with pytest.raises(IndexError):
        names[5]


def test_an_index_is_small():
    rows = 20_000
    extent = Extent(path=Path("x"), offset=0, size=1, stamp=0)
    sample = Sample(key="", kind="image", source="", media=extent, text=None, fields=None)
    names = [f"{number:09}.jpg" for number in range(rows)]
    table = MediaTable.of(names, [sample] * rows, [Header(height=9, width=8, codec="jpeg")] * rows)
    index = MediaIndex([(0, Path("input"), table)])
    assert index[rows - 1].key == "000019999" and index.codec(7) == "jpeg"
    # Measured: 72 bytes, of them 13 the name; lists of str and int64 took 254.
    assert len(pickle.dumps(index)) / rows < 80


def test_a_digest_names_what_there_is_to_see(folder, tmp_path):
    def digest(path: Path, **options) -> str:
        return build_index([str(path)], options.get("index_dir"), silent).digest

    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    whole = digest(folder)
    assert digest(copy) == whole, "neither the place nor the time of the files counts"
    kept = str(tmp_path / "index")
    assert digest(copy, index_dir=kept) == digest(copy, index_dir=kept) == whole, "read or kept"
    seen = {whole}
    cat = copy / "plain_png.png"
    for change in (
        lambda: cat.rename(copy / "plain_pnh.png"),
        lambda: (copy / "plain_pnh.png").rename(cat),
        lambda: Image.open(cat).crop((0, 0, 200, 100)).save(cat),
        lambda: cat.write_bytes(b"\0" * cat.stat().st_size),
        lambda: cat.unlink(),
    ):
        change()
        seen.add(digest(copy))
    assert len(seen) == 5, "renamed, back as it was, cut, unreadable, gone"
    together, apart = (
        build_index(inputs, None, silent).digest for inputs in ([f"{copy}/*"], sorted(map(str, copy.iterdir())))
    )
    assert together != apart, "the number of the input counts: batches are mixed by it"


@pytest.mark.parametrize("name", ["vp9.webm", "mjpeg.avi", "h264.mp4", "mpeg4.avi"])
def test_single_frames_are_those_of_the_whole_clip(folder, name):
    data = (folder / name).read_bytes()
    whole = all_frames(data)
    for numbers in ([0], [47], [3, 4, 5, 6], [11, 19, 27, 35], [20, 20, 21, 40], list(range(48))):
        assert np.array_equal(decode_frames(data, numbers), whole[numbers]), numbers
    with pytest.raises(MediaError, match="ends before its frame 48"):
        decode_frames(data, [46, 48])


def bitstream_of(container) -> list[av.Packet]:
    """The packets of an H.264 stream as they stand in a file without a container."""
    stream = container.streams.video[0]
    convert = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream)
    return [out for packet in container.demux(stream) for out in convert.filter(packet if packet.size else None)]


def test_damaged_clips_are_a_media_error(folder):
    data = (folder / "vp9.webm").read_bytes()
    for damaged in (b"", b"no clip", data[:300], data[: len(data) // 2]):
        with pytest.raises(MediaError):
            decode_frames(damaged, [40])
    with av.open(io.BytesIO((folder / "h264.mp4").read_bytes())) as container:
        raw = b"".join(map(bytes, bitstream_of(container)))
    with pytest.raises(MediaError, match="no time stamp"):
        decode_frames(raw, [40])


def test_frames_at_a_rate_are_those_of_decode_clip(folder):
    data = (folder / "h264.mp4").read_bytes()
    clip = decode_clip(data, frame_rate=4, max_frames=8, multiple=4, resize=lambda frame: frame)
    assert np.array_equal(decode_frames(data, [int((k / 4 + 5e-4) * 25) for k in range(8)]), clip.frames_THWC)


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_an_index_is_read_again_only_where_its_input_changed(folder, tmp_path, layout):
    copy = tmp_path / "media"
    shutil.copytree(folder, copy)
    picture = copy / "plain_png.png"
    source = copy if layout == "folder" else tmp_path / "shard.tar"

    def indexed() -> int:
        if layout == "tar":
            stamp = source.stat().st_mtime_ns if source.exists() else None
            pack(copy, source)
            if keep_stamp and stamp:
                os.utime(source, ns=(stamp, stamp))
        index = build_index([str(source)], str(tmp_path / "index"), silent)
        (number,) = [n for n in range(len(index)) if index[n].key == "plain_png"]
        return int(index.width[number])

    keep_stamp = True
    assert indexed() == 200
    size, stamp = picture.stat().st_size, picture.stat().st_mtime_ns
    Image.new("RGB", (30, 20)).save(picture)
    picture.write_bytes(picture.read_bytes().ljust(size, b"\0"))
    os.utime(picture, ns=(stamp, stamp))
    assert indexed() == 200, "same size and time: the header is not read again"
    keep_stamp = False
    os.utime(picture)
    assert indexed() == 30
    for kept in (tmp_path / "index").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert indexed() == 30, "a torn index is made anew"


def test_unreadable_headers_are_faults(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"x")
    (tmp_path / "worse.mp4").write_bytes(b"x" * 100)
    index = build_index([str(tmp_path)], None, silent)
    faults = {Path(index[number].source).name: why for number, why in index.faults()}
    assert set(faults) == {"bad.jpg", "worse.mp4"}
    assert "not a readable picture" in faults["bad.jpg"] and "not a readable clip" in faults["worse.mp4"]


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_what_listing_finds_unusable_is_skipped_and_named(folder, tmp_path, layout):
    """As in tokenization: a second picture of a key, the end of a tar that is cut off."""
    media = tmp_path / "media"
    media.mkdir()
    for name in ("a.jpg", "a.png", "b.jpg", "c.jpg"):
        shutil.copy(folder / f"plain_{name[-3:]}.{name[-3:]}", media / name)
    source, lost = media, {"a.png": "two media files of one key"}
    if layout == "tar":
        source, lost = pack(media, tmp_path / "shard.tar"), lost | {"c.jpg": "the tar is cut off"}
        with tarfile.open(source) as tar:
            end = tar.getmember("c.jpg").offset_data + 100
        source.write_bytes(source.read_bytes()[:end])
    for _ in range(2):  # read, then kept
        index = build_index([str(source)], str(tmp_path / "index"), silent)
        found = {index[number].source.removeprefix(f"{source}")[1:]: why for number, why in index.faults()}
        assert set(found) == set(lost) and all(why in found[name] for name, why in lost.items())
        usable = [index[number].key for number in range(len(index)) if index.height[number]]
        assert usable == (["a", "b", "c"] if layout == "folder" else ["a", "b"])


def test_patterns_name_folders_tars_and_media(folder, tmp_path):
    for name in ("00001", "00000"):
        pack(folder, tmp_path / f"{name}.tar")
        (tmp_path / f"{name}_stats.json").write_text("{}")
    assert [path.name for path in expand(f"{tmp_path}/*")] == ["00000.tar", "00001.tar"]
    assert expand(tmp_path / "00000.tar") == [tmp_path / "00000.tar"]
    pictures = build_index([f"{folder}/plain_*"], None, silent)
    assert [pictures[n].key for n in range(4)] == ["plain_jpg", "plain_png", "plain_tif", "plain_webp"]
    assert len(list_samples([f"{folder}/*.webm"])) == 1
    with pytest.raises(InputError, match=r"none\*.tar' matches no file and no folder"):
        expand(f"{tmp_path}/none*.tar")
    with pytest.raises(InputError, match="is missing"):
        expand(tmp_path / "none.tar")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(InputError, match="holds no picture"):
        build_index([f"{tmp_path}/empty.tar"], None, silent)
