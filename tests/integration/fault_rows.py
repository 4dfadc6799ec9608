"""The table of faults: a program, its arguments, what its line must name, and what to damage before."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pretrain_emu3
import tokenizer_train.text.train as train_text
import tokenizer_train.vision.train as train_vision
from megatron_ext.vocab import Image
from tests.unit.data.samples import CODEBOOK_SIZE, make_vocabulary, random_dataset, write_dataset
from tools import convert_checkpoint, generate, inspect_data, preprocess_data, tokenize_vision


@dataclass(frozen=True)
class Row:
    """One fault."""

    program: object
    arguments: str
    """Blank-separated; {w} is the workplace, {out} an empty folder."""
    names: tuple[str, ...]
    """What the line must hold."""
    damage: Callable[[Path], object] = lambda w: None
    """Done to the workplace before."""
    world_size: int = 1


def pretrain(arguments: str, *names: str, **more) -> Row:
    return Row(pretrain_emu3, f"--config {{w}}/config.yaml --observe.run_dir {{out}}/run {arguments}", names, **more)


def preprocess(arguments: str, *names: str, **more) -> Row:
    base = (
        f"--vocab.layout custom --vocab.text_tokenizer {{w}}/text.model --vocab.codebook_size {CODEBOOK_SIZE} "
        "--output_prefix {out}/set"
    )
    return Row(preprocess_data, f"{base} {arguments}", names, **more)


def tokenize(arguments: str, *names: str, **more) -> Row:
    base = "--tokenizer {w}/vision --output {out}/codes --device cpu --resize.rule square --resize.size 8"
    return Row(tokenize_vision, f"{base} {arguments}", names, **more)


def text_tokenizer(arguments: str, *names: str, **more) -> Row:
    return Row(train_text, f"--output {{out}}/text.model {arguments}", names, **more)


def vision_tokenizer(arguments: str, *names: str, **more) -> Row:
    base = "--observe.run_dir {out}/run --media.size 8 --media.batch_size 2 --train.train_steps 1"
    return Row(train_vision, f"{base} {arguments}", names, **more)


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Damage: the file holds something else."""
    return lambda w: (w / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str) -> Callable[[Path], object]:
    """Damage: half of the file is missing."""
    return lambda w: os.truncate(w / name, (w / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], object]:
    return lambda w: (w / name).unlink()


def edit(name: str, **changes: object) -> Callable[[Path], object]:
    """Damage: fields of a JSON file."""
    return lambda w: (w / name).write_text(json.dumps({**json.loads((w / name).read_text()), **changes}))


def foreign_ids(w: Path) -> None:
    ids = np.memmap(w / "train.bin", dtype=np.int32, mode="r+")
    ids[10:] = 10**6
    ids.flush()


def other_vision_tokenizer(w: Path) -> None:
    vocabulary = make_vocabulary((w / "text.model").read_bytes())
    random_dataset(w / "other", vocabulary, seed=2)
    edit("other.manifest.json", vision_tokenizer="ffff")(w)


def large_pictures(w: Path) -> None:
    vocabulary = make_vocabulary((w / "text.model").read_bytes())
    write_dataset(w / "large", vocabulary, [[Image(np.ones((8, 8), dtype=np.int64))]])


def other_codes(w: Path) -> None:
    shutil.copytree(w / "codes", w / "codes2")
    edit("codes2/manifest.json", vision_tokenizer="eeee")(w)


CONFIGURATION = {
    "unknown key": pretrain("--optim.lrr 1", "'optim.lrr'", "did you mean 'optim.lr'?"),
    "unknown section": pretrain("--optimizer.lr 1", "'optimizer.lr'", "'optim.lr'"),
    "unknown key in a file": pretrain(
        "--config {w}/more.yaml", "'train.train_step'", "'train.train_steps'",
        damage=write("more.yaml", "train: {train_step: 3}"),
    ),
    "key of another stack": pretrain(
        "--parallel.pipeline_model_parallel_size 2", "pipeline_model_parallel_size", "remove"
    ),
    "wrong type": pretrain("--optim.lr fast", "optim.lr", "fast", "float"),
    "no such choice": pretrain("--runtime.precision fp16", "runtime.precision", "fp16", "bf16"),
    "required key missing": Row(pretrain_emu3, "--config {w}/config.yaml", ("observe.run_dir",)),
    "configuration file missing": pretrain("--config {w}/none.yaml", "none.yaml"),
    "configuration file is no YAML": pretrain(
        "--config {w}/bad.yaml", "bad.yaml:2 is no YAML", damage=write("bad.yaml", "train:\n  [1, {")
    ),
    "layout does not divide the world": pretrain(
        "--parallel.tensor_model_parallel_size 2", "tensor_model_parallel_size 2", "3 ranks", world_size=3
    ),
    "layout of size 0": pretrain("--parallel.context_parallel_size 0", "context_parallel_size 0"),
    "sequence parallel without a tensor axis": pretrain("--parallel.sequence_parallel true", "sequence_parallel", "1"),
    "global batch": pretrain("", "train.global_batch_size 4", "data-parallel size 3", "multiple of 3", world_size=3),
    "micro batch 0": pretrain("--train.micro_batch_size 0", "train.micro_batch_size 0", "at least 1"),
    "window does not divide over context ranks": pretrain(
        "--parallel.context_parallel_size 2 --train.seq_length 66 --data.document_alignment 2 "
        "--data.attention_scope window",
        "train.seq_length 66", "context_parallel_size 2", "multiple of 4", world_size=2,
    ),
    "alignment does not suit context ranks": pretrain(
        "--parallel.context_parallel_size 2 --data.document_alignment 2",
        "data.document_alignment 2", "multiple of 4", world_size=2,
    ),
    "alignment does not divide the window": pretrain(
        "--data.document_alignment 24", "data.document_alignment 24", "64"
    ),
    "count past 2^31": pretrain("--train.global_batch_size 33554432", "train.global_batch_size 33554432", "2^31"),
    "weight is no k/n": pretrain("--objective.vision_loss_weight 0.123456", "vision_loss_weight 0.123456", "0.12"),
    "weight below 0": pretrain("--objective.vision_loss_weight -0.5", "vision_loss_weight -0.5"),
    "no data": pretrain("--data.train []", "data.train is empty", "prefix"),
    "evaluation without data": pretrain("--train.eval_interval 2", "train.eval_interval 2", "data.valid"),
    "save interval 0": pretrain("--checkpoint.save_interval 0", "checkpoint.save_interval 0"),
    "keep no checkpoint": pretrain("--checkpoint.keep 0", "checkpoint.keep 0: must be at least 1"),
    "half a recomputation": pretrain(
        "--parallel.recompute_granularity full", "recompute_granularity full", "recompute_method"
    ),
    "fp8 on a CPU": pretrain("--runtime.precision fp8 --runtime.device cpu", "runtime.precision is fp8", "bf16"),
    "GPU asked for and absent": pretrain(
        "--runtime.device cuda --runtime.precision bf16", "device is 'cuda'", "cpu or auto"
    ),
    "heads and groups": pretrain(
        "--model.num_query_groups 3", "model.num_attention_heads 2", "model.num_query_groups 3"
    ),
    "custom vocabulary without a tokenizer": pretrain("--vocab.text_tokenizer null", "vocab.text_tokenizer"),
    "Emu3's codebook changed": pretrain("--vocab.layout emu3", "vocab.", "layout emu3", "remove"),
    "text tokenizer missing": pretrain("--vocab.text_tokenizer {w}/none.model", "none.model", "No such file"),
    "text tokenizer is something else": pretrain(
        "--vocab.text_tokenizer {w}/config.yaml", "config.yaml", "SentencePiece"
    ),
    "run folder is a file": pretrain("--observe.run_dir {w}/text.model", "observe.run_dir", "text.model"),
    "initial weights missing": pretrain("--checkpoint.init_from {w}/none", "none", "step_XXXXXXXX"),
}  # fmt: skip

DATA = {
    "dataset missing": pretrain(
        '--data.train [{{"prefix":"{w}/none"}}]', "none.manifest.json is missing", "preprocess"
    ),
    ".idx without .bin": pretrain("", "train.bin is missing", "preprocess", damage=remove("train.bin")),
    ".bin without .idx": pretrain("", "train.idx is missing", "preprocess", damage=remove("train.idx")),
    ".bin cut": pretrain("", "train.bin has", "its manifest says", damage=cut("train.bin")),
    ".idx cut": pretrain("", "train.idx has", "its manifest says", damage=cut("train.idx")),
    "sidecar cut": pretrain("", "train.spans.npz is damaged", "rebuilt", damage=cut("train.spans.npz")),
    "manifest cut": pretrain("", "train.manifest.json", damage=cut("train.manifest.json")),
    "manifest of another version": pretrain(
        "", "format version 1", damage=edit("train.manifest.json", format_version=9)
    ),
    "data of another vocabulary": pretrain(
        "--vocab.codebook_size 51", "train was made with vocabulary", "preprocess again"
    ),
    "data of two vision tokenizers": pretrain(
        '--data.train [{{"prefix":"{w}/train"}},{{"prefix":"{w}/other"}}]', "train was made by", "other by ffff",
        damage=other_vision_tokenizer,
    ),
    "weight 0 in the blend": pretrain(
        '--data.train [{{"prefix":"{w}/train","weight":0}}]', "data.train[0]: weight 0.0", "above 0"
    ),
    "nothing fits": pretrain(
        '--data.train [{{"prefix":"{w}/large"}}] --train.seq_length 4', "no document of", "large", "train.seq_length 4",
        damage=large_pictures,
    ),
    "too little fits": pretrain(
        "--train.seq_length 8", "data.max_bad_fraction 0.01", "key/", "raise train.seq_length"
    ),
    "cache cannot be written": pretrain("--data.cache_dir {w}/text.model", "text.model", "set data.cache_dir"),
    "visual id outside the codebook": pretrain("", "train.bin holds id 1000000", "(key/", damage=foreign_ids),
}  # fmt: skip

PREPROCESSING = {
    "no input": preprocess("", "vision and text are both empty"),
    "codes missing": preprocess("--vision [{w}/none]", "none/manifest.json is missing", "tokenize_vision"),
    "codes unfinished": preprocess(
        "--vision [{w}/codes]", "codes/manifest.json is missing", damage=remove("codes/manifest.json")
    ),
    "codes of another codebook": preprocess("--vision [{w}/codes] --vocab.codebook_size 64", "codebook of 50", "64"),
    "code outside the codebook": preprocess(
        "--vision [{w}/codes] --vocab.codebook_size 20", "visual code", "the codebook has 20",
        damage=edit("codes/manifest.json", codebook_size=20),
    ),
    "shard missing": preprocess(
        "--vision [{w}/codes]", "codes-00001.tar is missing", damage=remove("codes/codes-00001.tar")
    ),
    "shard of something else": preprocess(
        "--vision [{w}/codes]", "codes-00000.tar", "tokenize again", damage=write("codes/codes-00000.tar", b"x" * 600)
    ),
    "samples missing": preprocess(
        "--vision [{w}/codes]", "holds 8 samples, its manifest says 9",
        damage=edit("codes/manifest.json", samples={"image": 9, "video": 0}),
    ),
    "two vision tokenizers": preprocess(
        "--vision [{w}/codes,{w}/codes2]", "made by vision tokenizer", "eeee",
        damage=other_codes,
    ),
    "captions missing": preprocess(
        "--vision [{w}/bare]", "1 of 1 samples", "max_bad_fraction 0.01", "lonely: it has no caption"
    ),
    "no such text": preprocess("--text [{w}/none*.txt]", "none*.txt", "matches no file"),
    "text is not UTF-8": preprocess(
        "--text [{w}/a.txt]", "1 of 2 samples", "a.txt:3: not UTF-8", damage=write("a.txt", b"fine\n\nbad \xff\n")
    ),
    "line without text": preprocess(
        "--text [{w}/a.jsonl]", "1 of 2 samples", "a.jsonl:2: no string in field text",
        damage=write("a.jsonl", '{"text":"x"}\n[]\n'),
    ),
    "held-out share of 1": preprocess(
        "--text [{w}/config.yaml] --valid_fraction 1", "valid_fraction 1.0", "below 1"
    ),
    "share of bad samples above 1": preprocess(
        "--text [{w}/config.yaml] --max_bad_fraction 2", "max_bad_fraction 2.0"
    ),
    "output below a file": preprocess(
        "--text [{w}/config.yaml] --output_prefix {w}/text.model/set", "output_prefix", "text.model"
    ),
    "document that is none": Row(inspect_data, "--prefix {w}/train --document 60", ("document is 60", "0..59")),
    "dataset damaged": Row(
        inspect_data, "--prefix {w}/train --validate true", ("train", "of 60 documents are invalid"), damage=foreign_ids
    ),
}  # fmt: skip

MEDIA = {
    "media missing": tokenize("--inputs [{w}/none]", "none", "is missing"),
    "no media": tokenize("--inputs [{w}/vision]", "vision", "no picture, no clip and no tar"),
    "tar of something else": tokenize("--inputs [{w}/text.model]", "text.model", "tar"),
    "two pictures of one key": tokenize(
        "--inputs [{w}/media]", "0.jpg", "0.png", "two media files", damage=write("media/0.jpg", b"x")
    ),
    "vision tokenizer missing": tokenize("--inputs [{w}/media] --tokenizer {w}/none", "none"),
    "vision tokenizer cut": tokenize(
        "--inputs [{w}/media]", "vision': model.safetensors", damage=cut("vision/model.safetensors")
    ),
    "size is no multiple": tokenize("--inputs [{w}/media] --resize.size 9", "resize.size = 9", "multiple"),
    "picture damaged": tokenize(
        "--inputs [{w}/media]", "1 of 4 samples", "max_bad_fraction", "1.png: not a readable picture",
        damage=write("media/1.png", b"x"),
    ),
    "caption is not UTF-8": tokenize(
        "--inputs [{w}/media]", "1 of 4 samples", "1.png: its captions are unreadable",
        damage=write("media/1.txt", b"\xff"),
    ),
    "output is a file": tokenize("--inputs [{w}/media] --output {w}/text.model", "output", "text.model"),
    "media of a training missing": vision_tokenizer("--media.inputs [{w}/none]", "none", "is missing"),
    "training size is no multiple": vision_tokenizer("--media.inputs [{w}/media] --media.size 9", "media.size = 9"),
    "training pictures damaged": vision_tokenizer(
        "--media.inputs [{w}/media] --model.ch 32 --model.ch_mult [1,1,1] --model.attn_resolutions [] "
        "--model.num_res_blocks 1 --codebook.kmeans_batches 1",
        "1 of 4 samples", "media.max_bad_fraction", "1.png: not a readable picture", damage=write("media/1.png", b"x"),
    ),
    "clips wanted and absent": vision_tokenizer(
        "--media.inputs [{w}/media] --media.clip_share 0.5 --media.batch_size 4", "clip_share = 0.5"
    ),
    "no such corpus": text_tokenizer("--input [{w}/none*.txt]", "none*.txt", "matches no file"),
    "corpus is not UTF-8": text_tokenizer(
        "--input [{w}/a.txt]", "1 of 2 samples", "a.txt:2: not UTF-8", damage=write("a.txt", b"fine\nbad \xff\n")
    ),
    "too many pieces for the corpus": text_tokenizer(
        "--input [{w}/config.yaml] --vocab_size 9000", "vocab_size 9000 is too large", "use at most"
    ),
}  # fmt: skip

RESULTS = {
    "decoder to draw with missing": Row(
        generate, "--task draw --caption [x] --output {out}/x", ("either hf or checkpoint",)
    ),
    "checkpoint to draw with missing": Row(
        generate, "--task draw --caption [x] --output {out}/x --checkpoint {w}/none --vision_tokenizer {w}/vision",
        ("none", "step_XXXXXXXX"),
    ),
    "Hugging Face folder missing": Row(
        generate, "--task draw --caption [x] --output {out}/x --hf {w}/none", ("none",)
    ),
    "no direction": Row(convert_checkpoint, "", ("direction ''", "to-hf, from-hf")),
    "checkpoint to export missing": Row(
        convert_checkpoint, "to-hf --checkpoint {w}/none --vision_tokenizer {w}/vision --output {out}/hf",
        ("none", "step_XXXXXXXX"),
    ),
    "folder to import missing": Row(convert_checkpoint, "from-hf --hf {w}/none --output {out}/x", ("none",)),
    "folder to import is something else": Row(
        convert_checkpoint, "from-hf --hf {w}/vision --output {out}/x", ("vision",)
    ),
}  # fmt: skip

ROWS = CONFIGURATION | DATA | PREPROCESSING | MEDIA | RESULTS
