"""preprocess_data.py and inspect_data.py on small inputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.data import DocumentDataset
from megatron_ext.vocab import Image, Text, decode_document
from tests.unit.data.samples import CODEBOOK_SIZE, write_tokenized_folder
from tools import inspect_data, preprocess_data


@pytest.fixture
def inputs(tmp_path, text_model) -> Path:
    rng = np.random.default_rng(0)
    media = {
        f"photo{number}": (rng.integers(0, CODEBOOK_SIZE, (2, 3)), ["a cat sits", "two dogs"]) for number in range(30)
    }
    media["clip"] = (rng.integers(0, CODEBOOK_SIZE, (3, 2, 3)), ["three birds"])
    media["bare"] = (rng.integers(0, CODEBOOK_SIZE, (1, 1)), ["  "])
    write_tokenized_folder(tmp_path / "codes", media)
    (tmp_path / "prose.txt").write_text("one line\nof a paragraph\n\n \n\nanother paragraph\n")
    (tmp_path / "web.jsonl").write_text('{"text": "a document\\n\\nof two"}\n\n{"text": " "}\n')
    (tmp_path / "text.model").write_bytes(text_model)
    return tmp_path


def arguments(folder: Path, output: str = "out/set", **options) -> list[str]:
    given = {
        "vocab.layout": "custom",
        "vocab.text_tokenizer": folder / "text.model",
        "vocab.codebook_size": CODEBOOK_SIZE,
        "vision": [str(folder / "codes")],
        "text": [str(folder / "*.txt"), str(folder / "*.jsonl")],
        "output_prefix": folder / output,
        "missing_caption": "keep",
        **options,
    }
    return [f"--{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in given.items()]


def decoded(prefix: Path) -> list[tuple[str, tuple]]:
    """(key, segments with texts as strings) of all documents."""
    dataset = DocumentDataset.open(prefix)
    return [
        (
            dataset.sidecar.key(number),
            tuple(
                dataset.vocabulary.text.decode(segment.ids) if isinstance(segment, Text) else segment
                for segment in decode_document(dataset.ids(number), dataset.vocabulary)
            ),
        )
        for number in range(len(dataset))
    ]


def test_documents(inputs, capsys):
    preprocess_data.main(arguments(inputs, caption_position="both"))
    documents = decoded(inputs / "out/set_train")
    by_key = {}
    for key, segments in documents:
        by_key.setdefault(key, []).append(segments)
    photo = [[part if isinstance(part, str) else type(part) for part in segments] for segments in by_key["photo7"]]
    assert photo == [["a cat sits", Image], [Image, "a cat sits"], ["two dogs", Image], [Image, "two dogs"]]
    assert by_key["clip"][0][0] == "three birds" and by_key["clip"][0][1].frame_rate_mhz == 4000
    assert [type(part) for part in by_key["bare"][0]] == [Image]
    texts = {key.rsplit("/", 1)[1]: segments for key, segments in documents if "#" in key}
    assert texts == {
        "prose.txt#1": ("one line\nof a paragraph",),
        "prose.txt#2": ("another paragraph",),
        "web.jsonl#1": ("a document\n\nof two",),
    }
    printed = capsys.readouterr().out
    assert "set_train: 126 documents" in printed
    assert "left out: 1 empty captions" in printed and "left out: 1 empty texts" in printed


@pytest.mark.parametrize(("unit", "count"), [("line", 3), ("paragraph", 2), ("file", 1)])
def test_text_units(inputs, unit, count):
    preprocess_data.main(arguments(inputs, vision=[], text=[str(inputs / "prose.txt")], text_unit=unit))
    assert len(DocumentDataset.open(inputs / "out/set_train")) == count


def test_random_caption_positions_follow_key_and_seed(inputs):
    def positions(output: str, seed: int) -> list[bool]:
        preprocess_data.main(arguments(inputs, output, text=[], seed=seed))
        return [isinstance(segments[0], Image) for _, segments in decoded(inputs / f"{output}_train")]

    first = positions("a", 1)
    assert 15 < sum(first) < 47  # 62 draws with probability a half: 31 expected, sigma 4
    assert positions("b", 1) == first and positions("c", 2) != first


def test_held_out_keys_are_on_one_side_whatever_the_seed(inputs):
    sides = []
    for seed in (1, 2):
        preprocess_data.main(arguments(inputs, f"out{seed}", valid_fraction=0.3, seed=seed))
        train, valid = ({key for key, _ in decoded(inputs / f"out{seed}_{split}")} for split in ("train", "valid"))
        assert not train & valid and len(train | valid) == 35
        assert 4 <= len(valid) <= 17  # 10.5 expected, sigma 2.7
        sides.append(valid)
    assert sides[0] == sides[1]


def test_reruns_give_the_same_bytes(inputs):
    for output in ("a/set", "b/set"):
        preprocess_data.main(arguments(inputs, output, valid_fraction=0.3))
    files = [path.relative_to(inputs / "a") for path in (inputs / "a").rglob("set*") if path.is_file()]
    files += [path.relative_to(inputs / "a") for path in (inputs / "a").rglob("set*.vocabulary/*")]
    assert len(files) == 13
    assert all((inputs / "a" / path).read_bytes() == (inputs / "b" / path).read_bytes() for path in files)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab.codebook_size": 64}, "tokenized with a codebook of 50, vocabulary custom has 64"),
        ({"vision": ["nowhere"]}, "nowhere/manifest.json is missing"),
        ({"text": ["nowhere/*.txt"]}, "matches no file"),
        ({"vision": [], "text": []}, "vision and text are both empty"),
        ({"valid_fraction": 1.0}, "valid_fraction 1.0: must be below 1"),
        ({"valid_fraction": 1e-9}, "valid would be empty: .* none of the 65 documents"),
    ],
)
def test_bad_options_are_refused(inputs, options, message):
    with pytest.raises(InputError, match=message):
        preprocess_data.main(arguments(inputs, **options))
    assert not list((inputs / "out").glob("set*")), "nothing is left behind"


def test_bad_media_are_refused(inputs):
    edit_manifest(inputs / "codes", codebook_size=20)
    with pytest.raises(InputError, match=r"codes-00000.tar: photo0 has visual code \d+, the codebook has 20"):
        preprocess_data.main(arguments(inputs, **{"vocab.codebook_size": 20}))
    edit_manifest(inputs / "codes", codebook_size=CODEBOOK_SIZE, samples={"image": 99, "video": 0})
    with pytest.raises(InputError, match="holds 32 samples, its manifest says 99"):
        preprocess_data.main(arguments(inputs))
    edit_manifest(inputs / "codes", samples={"image": 31, "video": 1})
    other = write_tokenized_folder(inputs / "other", {"x": (np.ones((1, 1), int), [])}, vision_tokenizer="ffff")
    with pytest.raises(InputError, match="made by vision tokenizer"):
        preprocess_data.main(arguments(inputs, vision=[str(inputs / "codes"), str(other)]))
    (inputs / "codes" / "codes-00001.tar").unlink()
    with pytest.raises(InputError, match="codes-00001.tar is missing"):
        preprocess_data.main(arguments(inputs))


def test_bad_samples_are_skipped_by_name_and_stop_above_their_fraction(inputs, capsys):
    (inputs / "web.jsonl").write_text('{"text": "fine"}\n{"content": "no text"}\n{"text": "half \\ud83d"}\n["x"]\n')
    (inputs / "prose.txt").write_bytes(b"fine\n\nfirst line\nsecond \xff line\n\nfine again\n")
    half = {"half": (np.ones((1, 1), int), ["fine", "half \ud83d"]), "whole": (np.ones((1, 1), int), ["fine"])}
    other = str(write_tokenized_folder(inputs / "other", half))
    given = {"vision": [str(inputs / "codes"), other], "missing_caption": "skip"}
    preprocess_data.main(arguments(inputs, max_bad_fraction=6 / 41, **given))
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    unicode = "not UTF-8: it has a broken byte or a lone surrogate"
    assert skipped == [
        f"skipped {inputs}/codes/codes-00001.tar: bare: it has no caption",
        f"skipped {inputs}/other/codes-00000.tar: half: a caption is {unicode}",
        f"skipped {inputs}/prose.txt:3: {unicode}",
        f"skipped {inputs}/web.jsonl:2: no string in field text",
        f"skipped {inputs}/web.jsonl:3: {unicode}",
        f"skipped {inputs}/web.jsonl:4: no string in field text",
    ]
    keys = [key for key, _ in decoded(inputs / "out/set_train")]
    assert not {"bare", "half"} & set(keys) and "whole" in keys
    assert [key.rsplit("/")[-1] for key in keys if "#" in key] == ["prose.txt#1", "prose.txt#3", "web.jsonl#1"]
    message = r"6 of 41 samples .*, more than max_bad_fraction 0.14 .*: bare: it has no caption; .*: half: .*; ..."
    with pytest.raises(InputError, match=message):
        preprocess_data.main(arguments(inputs, "again/set", max_bad_fraction=0.14, **given))
    assert not list((inputs / "again").iterdir())


def test_a_stale_held_out_set_is_refused(inputs):
    preprocess_data.main(arguments(inputs, valid_fraction=0.3))
    with pytest.raises(InputError, match="left from a run with another valid_fraction"):
        preprocess_data.main(arguments(inputs))


def test_inspect(inputs, capsys):
    preprocess_data.main(arguments(inputs))
    capsys.readouterr()
    prefix = str(inputs / "out/set_train")
    inspect_data.main(["--prefix", prefix, "--seq_length", "8", "--document_alignment", "8", "--validate", "true"])
    printed = capsys.readouterr().out
    assert "65 documents" in printed and "ids per document" in printed
    assert "windows of 8 ids" in printed and "skipped: photo" in printed
    assert "all 65 documents are valid" in printed and "NOT" not in printed
    inspect_data.main(["--prefix", prefix, "--document", "0"])
    printed = capsys.readouterr().out
    assert "key: photo0" in printed and "image  2 x 3 codes" in printed and "'a cat sits'" in printed
    with pytest.raises(InputError, match="has documents 0..64"):
        inspect_data.main(["--prefix", prefix, "--document", "65"])


def test_inspect_finds_damage(inputs, capsys):
    preprocess_data.main(arguments(inputs))
    prefix = inputs / "out/set_train"
    dataset = DocumentDataset.open(prefix)
    content = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r+")
    content[int(dataset.lengths[0])] = dataset.vocabulary.layout.eos  # where document 1 has its BOS
    content.flush()
    with pytest.raises(InputError, match="1 of 65 documents are invalid"):
        inspect_data.main(["--prefix", str(prefix), "--validate", "true"])
    printed = capsys.readouterr().out
    assert ".bin        NOT what the manifest says" in printed
    assert "document 1 (photo0) at position 0" in printed


def test_inspect_finds_valid_documents_that_were_not_written(inputs):
    preprocess_data.main(arguments(inputs))
    prefix = inputs / "out/set_train"
    layout = DocumentDataset.open(prefix).vocabulary.layout
    content = np.memmap(f"{prefix}.bin", dtype=np.int32, mode="r+")
    first = int(layout.is_visual(content).argmax())
    content[first] = layout.visual_start + (content[first] - layout.visual_start + 1) % CODEBOOK_SIZE
    content.flush()
    with pytest.raises(InputError, match="set_train.bin is not what its manifest says"):
        inspect_data.main(["--prefix", str(prefix), "--validate", "true"])


def test_inspect_a_blend(inputs, capsys):
    preprocess_data.main(arguments(inputs))
    blend = [{"prefix": str(inputs / "out/set_train"), "weight": 3}]
    settings = {"vocab": {"layout": "custom", "text_tokenizer": str(inputs / "text.model"), "codebook_size": 50},
                "train": {"seq_length": 64, "global_batch_size": 1, "train_steps": 1}, "data": {"train": blend},
                "observe": {"run_dir": "run"}}  # fmt: skip
    (inputs / "run.yaml").write_text(json.dumps(settings))
    capsys.readouterr()
    inspect_data.main(["--blend", str(inputs / "run.yaml")])
    printed = capsys.readouterr().out
    assert "windows of 64 ids" in printed and "100.0%" in printed and "share" in printed
    assert not (inputs / "out" / "packing_cache").exists()  # looking leaves nothing behind
    for wrong in ([], ["--prefix", "a", "--blend", "b"]):
        with pytest.raises(InputError, match="give prefix"):
            inspect_data.main(wrong)


def test_inspect_takes_a_rebuilt_sidecar(inputs, capsys):
    preprocess_data.main(arguments(inputs))
    (inputs / "out/set_train.spans.npz").unlink()
    inspect_data.main(["--prefix", str(inputs / "out/set_train"), "--validate", "true"])
    assert ".spans.npz  NOT what the manifest says" in capsys.readouterr().out
