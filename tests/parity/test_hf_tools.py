"""The programs, end to end: checkpoint -> Hugging Face -> checkpoint, and generation from either."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from megatron_ext.config import InputError, to_yaml
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.data.batch import Window, collate
from megatron_ext.generate import TextDecoder
from megatron_ext.hf import is_hf_folder
from megatron_ext.model import build_model
from megatron_ext.runtime import Topology
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer, save_vision_tokenizer, to_uint8
from tests.support.small_models import DECODER, VISION, small_vocabulary
from tests.support.weights_only import save_weights
from tools import convert_checkpoint, generate


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a checkpoint and a vision tokenizer, with random weights."""
    folder = tmp_path_factory.mktemp("trained")
    vocabulary = small_vocabulary()
    section = "".join(f"  {line}\n" for line in to_yaml(DECODER).splitlines())
    config_yaml = f"model:\n{section}train:\n  seq_length: 96\n"
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        model = build_model(DECODER, ParallelConfig(), vocabulary.layout, topology, seed=3)
        save_weights(folder / "checkpoints", model, topology, vocabulary, config_yaml)
    torch.manual_seed(0)
    vision = MoVQGAN(VISION).eval()
    with torch.no_grad():
        vision.quantize.embedding.weight.normal_()
    save_vision_tokenizer(vision, folder / "vision")
    return folder, folder / "vision"


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as a Hugging Face folder."""
    output = tmp_path_factory.mktemp("exported")
    run, vision = trained
    convert_checkpoint.main(
        ["to-hf", "--checkpoint", str(run), "--vision_tokenizer", str(vision), "--output", str(output),
         "--check", "false"]
    )  # fmt: skip
    return output


def test_round_trip_through_the_programs(
    exported: Path, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    convert_checkpoint.main(["from-hf", "--hf", str(exported), "--output", str(tmp_path / "back")])
    vision = tmp_path / "back" / "vision_tokenizer"
    for name in ("config.json", "model.safetensors"):
        assert (vision / name).read_bytes() == (trained[1] / name).read_bytes()
    convert_checkpoint.main(
        ["to-hf", "--checkpoint", str(tmp_path / "back"), "--vision_tokenizer", str(vision),
         "--output", str(tmp_path / "again")]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "There is no processor" not in said
    assert "checked" in said and "model Emu3ForConditionalGeneration, dtype float32, processor True" in said
    assert is_hf_folder(tmp_path / "again")
    for path in sorted(exported.rglob("*.*")):
        if path.name in ("README.md", "provenance.json"):
            continue  # the second export has another history
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(exported)).read_bytes(), path.name


def test_another_model_is_not_overwritten(trained: tuple[Path, Path]) -> None:
    run, vision = trained
    with pytest.raises(InputError, match="vision holds a model that was not exported from here"):
        convert_checkpoint.main(
            ["to-hf", "--checkpoint", str(run), "--vision_tokenizer", str(vision), "--output", str(vision)]
        )
    assert (vision / "model.safetensors").is_file()


def test_a_vision_tokenizer_is_needed(trained: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vision_tokenizer is empty"):
        convert_checkpoint.main(["to-hf", "--checkpoint", str(trained[0]), "--output", str(tmp_path / "x")])


def test_drawing_from_checkpoint_and_from_export_is_the_same(
    exported: Path, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    wanted = ["--task", "draw", "--caption", '["a red fox", "一只狐狸"]', "--grid", "3*4", "--seed", "7"]
    wanted += ["--keep_codes", "true"]
    generate.main([*wanted, "--hf", str(exported), "--output", str(tmp_path / "hf")])
    generate.main(
        [*wanted, "--checkpoint", str(trained[0]), "--vision_tokenizer", str(trained[1]), "--batch_size", "1",
         "--output", str(tmp_path / "mcore")]
    )  # fmt: skip
    results = json.loads((tmp_path / "hf" / "results.json").read_text())
    assert [result["caption"] for result in results] == ["a red fox", "一只狐狸"]
    tokenizer = load_vision_tokenizer(trained[1])
    for result in results:
        codes_HW = np.load(tmp_path / "hf" / result["file"].replace(".png", ".codes.npy"))
        (pixels_CHW,) = tokenizer.decode(torch.from_numpy(codes_HW).long()[None])
        with Picture.open(tmp_path / "hf" / result["file"]) as picture:
            assert np.array_equal(to_uint8(pixels_CHW), np.asarray(picture))
        with Picture.open(tmp_path / "hf" / result["file"]) as picture:
            assert picture.size == (32, 24)
        assert (tmp_path / "hf" / result["file"]).read_bytes() == (tmp_path / "mcore" / result["file"]).read_bytes()


def test_drawing_a_clip(exported: Path, tmp_path: Path) -> None:
    generate.main(
        ["--task", "draw", "--caption", '["a fox runs"]', "--grid", "2*2", "--frames", "2", "--hf", str(exported),
         "--keep_codes", "true", "--output", str(tmp_path)]
    )  # fmt: skip
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["grid"] == "2*2*2*8000*1000"
    with Picture.open(tmp_path / result["file"]) as clip:
        assert clip.n_frames == 8 and clip.size == (16, 16)
    codes_THW = np.load(tmp_path / "00000.codes.npy")
    assert codes_THW.shape == (2, 2, 2) and codes_THW.dtype.kind in "iu"


def test_captioning(exported: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(tmp_path / "fox.png")
    options = ["--hf", str(exported), "--image", str([str(tmp_path / "fox.png")]), "--max_text_ids", "12"]
    sizes = ["--resize.rule", "square", "--resize.size", "32"]
    texts = []
    for name in ("one", "two"):
        generate.main(["--task", "caption", *options, *sizes, "--output", str(tmp_path / name)])
        (result,) = json.loads((tmp_path / name / "results.json").read_text())
        texts.append(result["caption"])
    assert texts[0] == texts[1] and isinstance(texts[0], str)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["to-gguf"], "direction 'to-gguf'"),
        ([], "direction ''"),
        (["from-hf", "--hf", "/nowhere", "--output", "x"], "cannot be read"),
        (["check", "--hf", "/nowhere"], "/nowhere/SHA256SUMS: cannot be read"),
    ],
)
def test_wrong_conversions_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        convert_checkpoint.main(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "draw", "--output", "x", "--caption", '["a"]'], "either hf or checkpoint"),
        (["--task", "draw", "--output", "x", "--hf", "y"], "needs caption"),
        (["--task", "caption", "--output", "x", "--hf", "y"], "needs image"),
        (["--task", "draw", "--output", "x", "--checkpoint", "y", "--caption", '["a"]'], "vision_tokenizer is empty"),
    ],
)
def test_wrong_wishes_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate.main(argv)


def test_a_grid_is_needed_for_custom_vocabularies(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="grid is empty"):
        generate.main(["--task", "draw", "--caption", '["a"]', "--hf", str(exported), "--output", str(tmp_path)])


@pytest.mark.parametrize("qk_layernorm", [False, True])
def test_the_decoder_of_generation_is_ours(qk_layernorm: bool) -> None:
    """Prefill on transformers' model (Qwen3's with QK norm) against a pass of megatron-core's."""
    section = ModelConfig(**{**vars(DECODER), "qk_layernorm": qk_layernorm})
    layout = small_vocabulary().layout
    ids = np.random.default_rng(0).integers(0, layout.size, 20)
    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology, torch.no_grad():
        model = build_model(section, ParallelConfig(), layout, topology, seed=3).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
        window = Window(ids=ids, labels=ids, mask=np.ones(20, dtype=bool), boundaries=np.array([0, 20]))
        expected = model.forward_batch(collate([window], [0], "document"), with_loss=False)[0, -1, : layout.size]
        decoder = TextDecoder.from_checkpoint(model, dtype=torch.float32, device=torch.device("cpu"))
        logits = decoder.prefill([torch.from_numpy(ids)])[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)  # measured 2e-7
