"""The text tokenizer's training: lossless, deterministic, and one clear line for bad input."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config import BadSamples, InputError, load
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.vocab import SentencePieceTokenizer, Vocabulary
from tokenizer_train.text.train import TextTokenizerTrainConfig, main, read_corpus, train_model

ROOT = Path(__file__).parents[3]
LINES = [
    "A small cat sat on 3 red mats and looked out of the window at heavy rain.",
    "**Twelve** dogs, 12*12 birds",
    "一只猫坐在垫子上。",
    "",
    "x" * 9000,
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(LINES))
    (folder / "a.txt").write_text("another cat\r\nsat\n")
    (folder / "c.json").write_text(
        json.dumps({"caption": "two cats", "caption_zh": "两只猫", "captions": ["cats"], "caption_length": 8})
    )
    return folder


def _arguments(corpus: Path, output: str | Path, **options: object) -> list[str]:
    patterns = [str(corpus / "*.txt"), str(corpus / "*.json")]
    return [f"--input={json.dumps(patterns)}", f"--output={output}", "--vocab_size=310"] + [
        f"--{name}={value}" for name, value in options.items()
    ]


def test_corpus(corpus: Path) -> None:
    found = read_corpus((f"{corpus}/*.txt", f"{corpus}/**/*", f"{corpus}/*.json"), BadSamples(0))
    assert [path.name for path in found.files] == ["a.txt", "b.txt", "c.json"]
    assert found.lines == ("another cat", "sat", *filter(None, LINES), "two cats", "两只猫", "cats")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_model_and_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, model_type: str) -> None:
    output = tmp_path / "made" / "text.model"
    main(_arguments(corpus, output, model_type=model_type))
    report = json.loads(output.with_suffix(".json").read_text())
    assert report["pieces"] == 310 and report["files"] == 3 and report["lines"] == 9
    assert report["identity"] == "sentencepiece:" + hashlib.sha256(output.read_bytes()).hexdigest()
    assert sorted(path.name for path in output.parent.iterdir()) == ["text.json", "text.model"]
    printed = capsys.readouterr().out
    assert "read 3 files: 9 lines" in printed and f"wrote {output}: 310 pieces" in printed

    vocabulary = Vocabulary.load(VocabConfig(layout="custom", text_tokenizer=str(output), codebook_size=16))
    for text in [*LINES, "<s> </s> <unk> <0x41>\n\n\t 龘 \U0001f600 \u2581 \uff21 0123456789*"]:
        assert vocabulary.text.decode(vocabulary.text.encode(text)) == text
    assert vocabulary.text.pieces().count(b"") == 1  # <unk>: no control pieces


def test_digits_are_split() -> None:
    lines = ("2024 1024 1024 512*512 512*512 a**b cat**dog",) * 50
    config = TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=280)
    tokenizer = SentencePieceTokenizer(train_model(lines, config))
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("1024*512")] == list("1024*512")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_same_input_same_bytes(corpus: Path, tmp_path: Path, model_type: str) -> None:
    """Also in another process, and with one core where there are more."""
    outputs = [tmp_path / "here.model", tmp_path / "there.model"]
    main(_arguments(corpus, outputs[0], model_type=model_type))
    program = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from tokenizer_train.text.train import main; main(sys.argv[1:])"
    )
    arguments = _arguments(corpus, outputs[1], model_type=model_type)
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 100000}, r"vocab_size 100000 is too large for this corpus: use at most \d+"),
        ({"vocab_size": 100}, r"vocab_size 100 is too small: .* are \d+ pieces"),
        ({"character_coverage": 0.5}, "character_coverage 0.5 is outside"),
        ({"model_type": "word"}, "model_type"),
    ],
)
def test_bad_options(corpus: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        main(_arguments(corpus, tmp_path / "text.model", **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "text.model").exists()


def test_report_may_not_replace_the_model(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name it .model"):
        main(_arguments(corpus, tmp_path / "text.json"))


def test_the_size_an_error_names_works(corpus: Path) -> None:
    lines = read_corpus((f"{corpus}/*.txt",), BadSamples(0)).lines

    def train(vocab_size: int) -> SentencePieceTokenizer:
        config = TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=vocab_size)
        return SentencePieceTokenizer(train_model(lines, config))

    with pytest.raises(InputError) as too_large:
        train(100_000)
    largest = int(str(too_large.value).split("at most ")[1].split(",")[0])
    assert train(largest).size == largest


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "matches no file"),
        ("empty.txt", b"\n \n", "hold no text"),
        ("latin.txt", b"caf\xe9", r"1 of 1 samples .* max_bad_fraction 0.01 \(.*latin.txt:1: not UTF-8\)"),
        ("list.json", b"[1]", "list.json: its captions are unreadable: not a JSON object"),
        ("broken.json", b"{", "broken.json: its captions are unreadable: Expecting"),
        ("half.json", b'{"caption": "\\ud83d"}', "half.json: its captions are unreadable: .* surrogates"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_corpus((str(tmp_path / name),), BadSamples(0.01))


def test_a_bad_line_and_a_bad_caption_file_are_skipped_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\ncaf\xe9\nfine again\n")
    (tmp_path / "b.json").write_text("{")
    bad = BadSamples(0.5)
    assert read_corpus((f"{tmp_path}/*",), bad).lines == ("fine", "fine again")
    assert list(bad.reasons) == [f"{tmp_path}/a.txt:2", f"{tmp_path}/b.json"]
    with pytest.raises(InputError, match="2 of 4 samples cannot be used, more than max_bad_fraction 0.49"):
        read_corpus((f"{tmp_path}/*",), BadSamples(0.49))


def test_shipped_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "examples" / "text_tokenizer_tiny.yaml"
    config = load(TextTokenizerTrainConfig, ["--config", str(path), f"--output={tmp_path / 'text.model'}"])
    main(["--config", str(path), f"--output={config.output}"])
    tokenizer = SentencePieceTokenizer(config.output)
    assert tokenizer.size == config.vocab_size == 1000
    english = "A huge brown bison grazes on the prairie."
    # Measured 1.95 characters per token; bytes would be 1.
    assert len(english) / len(tokenizer.encode(english)) > 1.7
