"""The text tokenizer's training: lossless, deterministic, and one clear line for bad input."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import InputError, load
from megatron_ext.config.vocab import VocabConfig
from megatron_ext.hf.tokenizer import build_tokenizer
from megatron_ext.vocab import QwenTokenizer, SentencePieceTokenizer, Vocabulary
from tokenizer_train.text.train import TextTokenizerTrainConfig, main, train_model

ROOT = Path(__file__).parents[3]
LINES = [
    "A small cat sat on 3 red mats and looked out of the window at heavy rain.",
    "**Twelve** dogs, 12*12 birds",
    "一只猫坐在垫子上。",
    "",
    "x" * 9000,
]
ADVERSARIAL = (
    *LINES,
    "<s> </s> <unk> <0x41> <|endoftext|> <|image start|>\n\n\t 龘 \u2581 \uff21 0123456789*",
    "2024年12月31日 3.14159 ２３ 1,000,000 0x1F",
    "🦊👩\u200d👩\u200d👧🏳️\u200d🌈 e\u0301 é \ufeff \u200b \x00\x7f ﬁ ½",
    "中文，english混排ABC。「引号」……  two  spaces\r\n",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(LINES))
    (folder / "a.txt").write_text("another cat\r\nsat\n")
    records = [{"text": "two cats\n\nof one document"}, {"text": "两只猫"}]
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def _arguments(corpus: Path, output: str | Path, **options: object) -> list[str]:
    patterns = [str(corpus / "*.txt"), str(corpus / "*.jsonl")]
    options = {"vocab_size": 310, "held_out_fraction": 0} | options
    return [f"--input={json.dumps(patterns)}", f"--output={output}"] + [
        f"--{name}={value}" for name, value in options.items()
    ]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_model_and_report(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, model_type: str) -> None:
    output = tmp_path / "made" / "text.model"
    main(_arguments(corpus, output, model_type=model_type))
    report = json.loads(output.with_suffix(".json").read_text())
    # Lines of 9,000 characters are cut in three.
    assert (report["pieces"], report["files"], report["documents"], report["lines"]) == (310, 3, 8, 11)
    assert report["identity"] == "sentencepiece:" + hashlib.sha256(output.read_bytes()).hexdigest()
    assert report["is_sampled"] is False and report["held_out"] == []
    assert sorted(path.name for path in output.parent.iterdir()) == ["text.json", "text.model"]
    printed = capsys.readouterr().out
    assert "read 8 documents, 9,150 characters: training on 11 lines, 0 lines held out" in printed
    assert f"wrote {output}: 310 pieces" in printed

    vocabulary = Vocabulary.load(VocabConfig(layout="custom", text_tokenizer=str(output), codebook_size=16))
    exported = build_tokenizer(vocabulary.text, vocabulary.layout)
    for text in ADVERSARIAL:
        ids = vocabulary.text.encode(text)
        assert vocabulary.text.decode(ids) == text
        assert vocabulary.is_text(np.asarray(ids, dtype=np.int64)).all()
        if "<|" not in text:  # the one difference of an exported tokenizer: it knows special strings
            theirs = exported.encode(text, add_special_tokens=False).ids
            assert exported.decode(theirs, skip_special_tokens=False) == exported.decode(ids) == text
            # A row of equal letters has segmentations of equal probability: see hf.tokenizer.
            assert theirs == ids or (model_type == "unigram" and text == LINES[-1])
    assert vocabulary.text.pieces().count(b"") == 1  # <unk>: no control pieces


def test_held_out_part_beside_qwen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "the cat sat on a red mat in old rain with grey dogs under trees".split()
    english = [f"{words[i % 14]} {words[i * 5 % 14]} and {words[i * 3 % 13]} number {i}" for i in range(300)]
    chinese = [f"第{i}只猫坐在{'红白黑'[i % 3]}色的垫子上，看{'风雨雪'[i % 3]}。" for i in range(300)]
    (tmp_path / "c.txt").write_text("\n".join(english + chinese))
    output = tmp_path / "text.model"
    main([f"--input=[{tmp_path}/c.txt]", f"--output={output}", "--vocab_size=400", "--held_out_fraction=0.2"])
    report = json.loads(output.with_suffix(".json").read_text())
    rows = {(row["language"], row["tokenizer"]): row for row in report["held_out"]}
    assert {language for language, _ in rows} == {"english", "chinese", "all"}
    assert report["lines"] + rows["all", "this model"]["lines"] == 600

    # The same figures, counted here from the lines themselves.
    held_out = set(english + chinese) - _trained_on(english + chinese, report["lines_sha256"])
    ours, qwen = SentencePieceTokenizer(output), QwenTokenizer()
    for language, name, text_tokenizer in (("english", "this model", ours), ("chinese", "Qwen (Emu3's)", qwen)):
        lines = [line for line in held_out if (line in english) == (language == "english")]
        tokens = sum(len(text_tokenizer.encode(line)) for line in lines)
        units = sum(len(line.split()) if language == "english" else len(line) for line in lines)
        row = rows[language, name]
        assert (row["lines"], row["tokens"]) == (len(lines), tokens)
        assert row["fertility"] == round(tokens / units, 4)
        assert row["bytes_per_token"] == round(sum(len(line.encode()) for line in lines) / tokens, 4)
    assert "tokens per word" in (printed := capsys.readouterr().out) and "tokens per character" in printed


def _trained_on(lines: list[str], digest: str) -> set[str]:
    """What is not held out, found by the rule of docs/tokenizer.md, and in the order that the report's digest says."""

    def hashed(line: str, key: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8, key=key).digest(), "big")

    kept = [line for line in lines if hashed(line, b"held out documents") >= 0.2 * 2**64]
    kept.sort(key=lambda line: hashed(line, b"sample 1234"))
    assert hashlib.sha256("".join(f"{line}\n" for line in kept).encode()).hexdigest() == digest
    return set(kept)


def _trained(lines: list[str], tmp_path: Path, **options: object) -> Vocabulary:
    """The vocabulary of a model that the program trained on lines of plain text."""
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "text.model"
    options = {"vocab_size": 300, "held_out_fraction": 0} | options
    main([f"--input=[{tmp_path}/corpus.txt]", f"--output={output}", *(f"--{k}={v}" for k, v in options.items())])
    return Vocabulary.load(VocabConfig(layout="custom", text_tokenizer=str(output), codebook_size=16))


CHINESE = (ROOT / "examples/media/text/chinese.txt").read_text(encoding="utf-8").split("\n")[:40]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "vocab_size, lines",
    [
        (700, [line.translate(dict.fromkeys(map(ord, " 0123456789*"))) for line in CHINESE]),
        (288, ["the\tcat\tsat\ton\ta\tred\tmat\tin\told\train\twith\tgrey\tdogs\tunder\ttrees"] * 20),
        (279, ["short", "a", "lines"]),
    ],
    ids=["Chinese", "tabs", "short"],
)
def test_what_the_corpus_lacks_has_ids_all_the_same(
    tmp_path: Path, vocab_size: int, lines: list[str], model_type: str
) -> None:
    """Space, digits and `*`."""
    vocabulary = _trained(lines, tmp_path, vocab_size=vocab_size, model_type=model_type, character_coverage=0.98)
    for text in (*ADVERSARIAL, *lines):
        assert vocabulary.text.decode(vocabulary.text.encode(text)) == text
    assert [len(vocabulary.text.encode(character)) for character in " 0123456789*"] == [1] * 12


def test_lines_with_a_reserved_character_are_trained_on(tmp_path: Path) -> None:
    vocabulary = _trained(["bar \u2585\u2585 line", "\u2585foo"] * 100, tmp_path, vocab_size=285)
    pieces = vocabulary.text.pieces()
    assert b"bar" in pieces and any(b"foo" in piece for piece in pieces)
    assert vocabulary.text.decode(vocabulary.text.encode("bar \u2585")) == "bar \u2585"


@pytest.mark.parametrize("line", ["\u2585", "2024 12*31", "\0\0", "\u2581 \u2581"])
def test_a_corpus_without_letters_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError, match="digits, spaces and control characters alone"):
        _trained([line] * 3, tmp_path)


def test_what_cannot_be_written_is_said_before_anything_is_read(corpus: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "taken.json").mkdir()
    for output in ("/dev/null/x.model", tmp_path, tmp_path / "taken.model", "/proc/x.model"):
        with pytest.raises(InputError, match="output: cannot write"):
            main(_arguments(corpus, output))
    assert "read" not in capsys.readouterr().out and sorted(os.listdir(tmp_path)) == ["corpus", "taken.json"]


def test_a_model_is_kept_whatever_happens_behind_it(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tokenizer_train.text.train.measure", lambda *given: 1 / 0)
    output = tmp_path / "text.model"
    with pytest.raises(ZeroDivisionError):
        main(_arguments(corpus, output, held_out_fraction=0.5))
    assert SentencePieceTokenizer(output).size == 310


def test_digits_are_split() -> None:
    lines = ("2024 1024 1024 512*512 512*512 a**b cat**dog",) * 50
    config = TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=280)
    tokenizer = SentencePieceTokenizer(train_model(lines, config))
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("1024*512")] == list("1024*512")


def test_same_texts_same_bytes(corpus: Path, tmp_path: Path) -> None:
    """Also in another process, with one core where there are more, and from one file instead of three."""
    lines = [line for path in sorted(corpus.glob("*.txt")) for line in path.read_text().splitlines()]
    records = [line for line in (corpus / "c.jsonl").read_text().splitlines()]
    joined = tmp_path / "joined.jsonl"
    joined.write_text("\n".join([*records, *(json.dumps({"text": line}) for line in reversed(lines))]))
    runs = []
    for model_type in ("bpe", "unigram"):
        here, there = (tmp_path / f"{model_type}_{place}.model" for place in ("here", "there"))
        main(_arguments(corpus, here, model_type=model_type))
        runs.append([*_arguments(corpus, there, model_type=model_type)[1:], f"--input=[{joined}]"])
    program = (
        "import json, os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from tokenizer_train.text.train import main; [main(run) for run in json.loads(sys.argv[1])]"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(runs)], cwd=ROOT, check=True)
    for here in tmp_path.glob("*_here.model"):
        assert here.read_bytes() == here.with_name(here.name.replace("here", "there")).read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": 100000}, r"vocab_size 100000 is too large for this corpus: use at most \d+"),
        ({"vocab_size": 270}, r"vocab_size 270 is too small: .* are \d+ pieces"),
        *(({"vocab_size": size}, rf"vocab_size {size}: must be at least 270") for size in (-5, 0, 269)),
        ({"vocab_size": 10**11}, "vocab_size 100000000000: must be at most 16,777,216"),
        ({"character_coverage": 0.5}, "character_coverage 0.5: must be at least 0.98"),
        ({"model_type": "word"}, "model_type"),
        ({"held_out_fraction": 1}, "held_out_fraction 1.0: must be below 1"),
        ({"sample_bytes": 0}, "sample_bytes 0: must be at least 1"),
        ({"input": "[]"}, "input and captions are both empty"),
        ({"captions": "[none/*.tar]"}, "captions 'none/\\*.tar' matches no file and no folder"),
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


def test_the_size_an_error_names_works() -> None:
    def train(vocab_size: int) -> SentencePieceTokenizer:
        config = TextTokenizerTrainConfig(input=("unused",), output="unused", vocab_size=vocab_size)
        return SentencePieceTokenizer(train_model(tuple(filter(None, LINES)), config))

    with pytest.raises(InputError) as too_large:
        train(100_000)
    largest = int(str(too_large.value).split("at most ")[1].split(",")[0])
    assert train(largest).size == largest


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
