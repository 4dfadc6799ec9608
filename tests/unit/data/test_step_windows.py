"""inspect_data.py --step: what it shows is what the step is given, on every layout."""

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Picture

from megatron_ext.config import InputError
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.config.train import TrainConfig
from megatron_ext.data import PackedDataset, PackingRules, build_data, context_indices
from megatron_ext.data.step_windows import documents_in_window
from megatron_ext.objectives import build_objective
from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, load_vision_tokenizer, save_vision_tokenizer, to_uint8
from megatron_ext.vocab import Image, Text, Video, encode_document
from tests.unit.data.samples import CODEBOOK_SIZE, clip, picture, random_dataset, text_of, write_dataset
from tests.unit.data.test_loader import Place
from tools import inspect_data

STEP, BATCH, MICRO, LENGTH = 3, 8, 2, 64
VISION = VisionTokenizerConfig(
    codebook_size=CODEBOOK_SIZE, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(1,)
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, text_model, vocabulary):
    """Two datasets of the codes of a vision tokenizer, and a pretraining configuration."""
    folder = tmp_path_factory.mktemp("step")
    torch.manual_seed(0)
    save_vision_tokenizer(MoVQGAN(VISION), folder / "vision")
    identity = load_vision_tokenizer(folder / "vision").identity
    (folder / "text.model").write_bytes(text_model)
    rng = np.random.default_rng(0)
    for name, text in (("short", 9), ("long", 150)):
        documents = [[text_of(vocabulary, text, rng), picture(rng)] for _ in range(20)]
        write_dataset(folder / name, vocabulary, [*documents, [clip(rng)]], identity)
    config = {
        "vocab": {"layout": "custom", "text_tokenizer": str(folder / "text.model"), "codebook_size": CODEBOOK_SIZE},
        "train": {"seq_length": LENGTH, "micro_batch_size": MICRO, "global_batch_size": BATCH, "train_steps": 9},
        "data": {"train": [{"prefix": str(folder / name)} for name in ("short", "long")], "document_alignment": 4},
        "observe": {"run_dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def inspect(workplace, *arguments: str) -> None:
    inspect_data.main(["--config", str(workplace / "config.yaml"), "--step", str(STEP), *arguments])


def loaders(workplace, vocabulary, places):
    """What pretrain_emu3.py builds on the ranks at `places`."""
    sets = tuple(DatasetConfig(prefix=str(workplace / name)) for name in ("short", "long"))
    train = TrainConfig(seq_length=LENGTH, micro_batch_size=MICRO, global_batch_size=BATCH, train_steps=9)
    return [
        build_data(DataConfig(train=sets, document_alignment=4), train, vocabulary, place).train for place in places
    ]


@pytest.mark.parametrize("context", [1, 2])
def test_the_ids_are_those_that_the_step_consumes(workplace, vocabulary, context, tmp_path, capsys):
    parallel = ["--parallel.context_parallel_size", str(context), "--world_size", "4"]
    inspect(workplace, *parallel, "--output", str(tmp_path))
    shown = np.load(tmp_path / "windows.npz")
    ranks = 4 // context
    places = [Place(r, ranks, c, context) for r in range(ranks) for c in range(context)]
    objective = build_objective(ObjectiveConfig(), vocabulary.layout)
    weight_sum, seen = 0, 0
    for place, loader in zip(places, loaders(workplace, vocabulary, places), strict=True):
        for number, batch in enumerate(loader.microbatches((STEP - 1) * BATCH)):
            rows = (shown["data_rank_W"] == place.data_parallel_rank) & (shown["microbatch_W"] == number)
            assert rows.sum() == MICRO
            held = context_indices(batch.cu_seqlens, place.context_parallel_rank, context)
            for name, expected in {
                "ids_WS": batch.tokens_BT,
                "labels_WS": batch.labels_BT,
                "weights_WS": objective.weights(batch.labels_BT, batch.label_mask_BT),
            }.items():
                assert np.array_equal(shown[name][rows].reshape(-1)[held], expected[0].numpy()), name
            zeros = torch.zeros_like(batch.labels_BT, dtype=torch.float32)
            weight_sum += int(objective.loss(batch, zeros, ("a", "b")).weight_sum)
            seen += batch.tokens_BT.numel()
    assert seen == BATCH * LENGTH, "every rank was looked at"
    assert f"their sum {weight_sum:,} divides the loss" in capsys.readouterr().out
    assert shown["sample_W"].tolist() == list(range((STEP - 1) * BATCH, STEP * BATCH))


def test_the_documents_are_what_the_ids_say(workplace, vocabulary):
    """Segments, put together again, are the ids between the positions they are said to have."""
    kinds = set()
    for name in ("short", "long"):
        packed = PackedDataset(workplace / name, vocabulary, PackingRules(seq_length=LENGTH, alignment=4))
        for number in range(len(packed)):
            ids = packed[number].ids
            for document in documents_in_window(packed, number):
                piece, position = document.piece, document.piece.begin + (document.piece.start == 0)
                for part in document.segments:
                    assert part.begin == position, "segments follow each other without a gap"
                    position = part.end
                    block = encode_document([part.segment], vocabulary)[1:-1]
                    if isinstance(part.segment, Video) and document.is_cut:
                        codes = ids[part.begin : part.end]
                        codes = vocabulary.layout.id_to_code(codes[vocabulary.layout.is_visual(codes)])
                        assert np.array_equal(codes, part.segment.codes_THW.ravel())
                    else:
                        assert np.array_equal(ids[part.begin : part.end], block)
                    kinds.add((type(part.segment), document.is_cut))
                ends = piece.start + piece.length == document.document_length
                assert position + ends == piece.begin + piece.length
    assert kinds == {(Text, False), (Text, True), (Image, False), (Image, True), (Video, False)}


def test_a_clip_cut_between_frames(tmp_path, vocabulary):
    """Two of seven frames of 10 ids each and a block start do not fit beside each other in 40 ids: frames are split."""
    video = clip(np.random.default_rng(1), frames=7)
    packed = PackedDataset(
        write_dataset(tmp_path / "clips", vocabulary, [[video]]), vocabulary, PackingRules(seq_length=40)
    )
    frames = [
        part.segment.codes_THW
        for _, number in sorted((packed.pieces(number)[0].start, number) for number in range(len(packed)))
        for document in documents_in_window(packed, number)
        for part in document.segments
    ]
    assert len(frames) > 1 and np.array_equal(np.concatenate(frames), video.codes_THW)


def test_the_printed_page(workplace, vocabulary, capsys):
    inspect(workplace, "--world_size", "2", "--data_rank", "1", "--longest_text", "20")
    printed = capsys.readouterr().out
    assert f"step {STEP}: samples 16..23, 8 windows of 64 ids, data ranks: 2, micro-batches of 2; not taken" in printed
    assert "weights: visual 1, text and structure 2" in printed
    assert printed.count("sample ") == 4 and "data rank 0" not in printed
    (loader,) = loaders(workplace, vocabulary, [Place(1, 2)])
    keys = [key for places in loader.places(16) for d, w in places for key in loader.datasets[d].keys(w)]
    assert re.findall(r"key (key/\d+)", printed) == keys
    assert "image  2 x 3 codes" in printed and " [...] " in printed
    cut = re.search(r"text   (\d+) ids.*\n", printed)
    assert cut and re.search(r"CUT: ids 0\.\.\d+ of 1\d\d", printed) and "padding: " in printed


def test_pictures_and_the_page(workplace, vocabulary, tmp_path, capsys):
    inspect(workplace, "--data_rank", "0", "--output", str(tmp_path), "--vision_tokenizer", str(workplace / "vision"))
    (loader,) = loaders(workplace, vocabulary, [Place()])
    vision = load_vision_tokenizer(workplace / "vision")
    drawn = 0
    for sample, (dataset, window) in enumerate((p for ps in loader.places(16) for p in ps), 16):
        for number, document in enumerate(documents_in_window(loader.datasets[dataset], window)):
            for index, part in enumerate(document.segments):
                path = tmp_path / "pictures" / f"{sample:08d}-{number:03d}-{index:03d}.png"
                assert path.exists() == (not isinstance(part.segment, Text))
                if isinstance(part.segment, Image):
                    expected = to_uint8(vision.decode(torch.from_numpy(part.segment.codes_HW)[None].long())[0])
                    assert np.array_equal(np.asarray(Picture.open(path)), expected)
                drawn += path.exists()
    assert drawn and drawn == len(list((tmp_path / "pictures").iterdir()))
    page = (tmp_path / "index.html").read_text()
    assert page.count("<h2>Sample ") == BATCH and page.count("data:image/png") >= drawn
    assert "wrote" in capsys.readouterr().out


def test_a_step_that_a_run_has_taken(workplace, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [f'{{"step": {step}, "global_batch_size": 4, "consumed_samples": {4 * step}}}\n' for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 3, "global_batch_size": 8, "consumed_samples": 16}\n')
    (run / "provenance.json").write_text('[{"step": 0, "identities": {"data": "other"}}]')
    inspect(workplace, "--observe.run_dir", str(run))
    printed = capsys.readouterr().out
    assert "samples 8..15," in printed and f"as {run} took it" in printed
    assert "NOT the data of" in printed
    with pytest.raises(InputError, match="gives step 3 16 windows, .* that it took 8"):
        inspect(workplace, "--observe.run_dir", str(run), "--train.global_batch_size", "16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "0"), "step 0: must be at least 1"),
        (("--world_size", "2", "--data_rank", "2"), "data ranks 0..1"),
        (("--world_size", "3"), "global_batch_size 8 is not a multiple"),
    ],
)
def test_bad_options_are_refused(workplace, arguments, message):
    with pytest.raises(InputError, match=message):
        inspect(workplace, *arguments)


def test_another_vision_tokenizer_is_refused(workplace, tmp_path, vocabulary):
    random_dataset(tmp_path / "other", vocabulary)
    data = ["--data.train", f'[{{"prefix": "{tmp_path / "other"}"}}]']
    with pytest.raises(InputError, match="the data was made by 0123456789abcdef"):
        inspect(workplace, *data, "--output", str(tmp_path), "--vision_tokenizer", str(workplace / "vision"))
