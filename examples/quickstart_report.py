"""runs/quickstart/report.html: what the quickstart did, from the files its programs wrote.

python examples/quickstart_report.py --run runs/quickstart --media examples/media
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image as Picture

from megatron_ext.config import load, run_program
from megatron_ext.config.section import Name, Section
from megatron_ext.data.indexed import DocumentDataset
from megatron_ext.data.packing import PackingRules, pack
from megatron_ext.data.sources import TokenizedFolder
from megatron_ext.files import read_json_lines
from megatron_ext.media import ResizeConfig, decode_clip, decode_picture, resize
from megatron_ext.observe.report import Card, Report, curves, smooth
from megatron_ext.vision import load_vision_tokenizer, to_uint8
from megatron_ext.vocab import Image, Video

MEMORISES = (
    "A model this small memorises. From the exact caption of a picture it has trained on it draws that picture again; "
    "another wording, or the caption of a picture that was held out, gives some other picture it has seen. This shows "
    "that every part works, not that the model understands."
)
SPAN = 15  # steps over which curves are averaged


@dataclass(frozen=True, kw_only=True)
class QuickstartReportConfig(Section):
    """Write the quickstart's report."""

    run: Name = "runs/quickstart"
    """Folder that the quickstart filled."""

    media: Name = "examples/media"
    """Folder of the pictures it used."""


def load_run(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[float, str]]:
    """Training lines, evaluation lines, and step -> layout for every start that changed the layout."""
    records = read_json_lines(folder / "metrics.jsonl")
    layouts: dict[float, str] = {}
    layout = ""
    for event in read_json_lines(folder / "events.jsonl"):
        if event["event"] == "start":
            parallel = event["config"]["parallel"]
            sizes = {"tensor": parallel["tensor_model_parallel_size"], "context": parallel["context_parallel_size"]}
            layout = (
                " × ".join(f"{axis} parallel {size}" for axis, size in sizes.items() if size > 1) or "data parallel"
            )
        elif event["event"] == "resume" and layout not in list(layouts.values())[-1:]:
            layouts[event["step"]] = layout
    return [r for r in records if "loss" in r], [r for r in records if "valid_loss" in r], layouts


def column(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values; a step without such a token has none."""
    present = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in present], [record[name] for record in present]


def tokens_per_second(record: dict[str, Any]) -> float:
    """Throughput of a step."""
    return record["timing"]["tokens_per_second"]


def add_training(page: Report, run: Path) -> None:
    """Curves of the decoder's run."""
    training, evaluation, layouts = load_run(run / "decoder")
    raw = {name: column(training, f"loss_{name}") for name in ("text", "vision")}
    page.section(
        "Training",
        "Two processes share one decoder; the run is stopped half way and resumed in another layout, with the same "
        "data in the same order. A dashed line marks where a layout begins.",
    )
    page.figure(
        curves(
            {name: (x, smooth(y, SPAN)) for name, (x, y) in raw.items()},
            faint=raw,
            marks=layouts,
            log_y=True,
            x_label="optimizer step",
            y_label="loss, nats per token",
        ),
        f"Loss of text (with the ids of the document's structure) and of visual tokens; mean of {SPAN} steps, single "
        "steps behind.",
    )
    steps, rates = [record["step"] for record in training], [tokens_per_second(record) for record in training]
    page.figure(
        curves({"tokens/s": (steps, smooth(rates, SPAN))}, marks=layouts, x_label="optimizer step", y_label="tokens/s"),
        "Throughput of both processes together, padding included.",
    )
    if evaluation:
        series = {name: column(evaluation, f"valid_loss_{name}") for name in ("text", "vision")}
        page.figure(
            curves(series, marks=layouts, x_label="optimizer step", y_label="held-out loss"),
            "Loss on documents that were held out: memorising, seen from outside.",
        )


def add_data(page: Report, datasets: dict[str, DocumentDataset], fills: dict[str, tuple[int, float]]) -> None:
    """A table of the datasets."""
    page.section(
        "Data",
        "Documents are packed into windows of equal length; a picture is never cut. A tenth of the sources is held "
        "out, with all documents made of them.",
    )
    rows = []
    for name, dataset in datasets.items():
        manifest, (windows, fill) = dataset.manifest, fills[name]
        visual = f"{manifest.visual_ids / manifest.num_ids:.0%}"
        rows.append([name, manifest.num_documents, manifest.num_ids, visual, windows, f"{fill:.1%}"])
    page.table(["dataset", "documents", "ids", "visual", "windows", "fill of the windows"], rows)


class Gallery:
    """Original, reconstruction and generation of the sample media, and how many came out right."""

    def __init__(self, run: Path, media: Path, held_out: set[str]) -> None:
        tokenizing = yaml.safe_load(Path("examples/tokenize_tiny.yaml").read_text())
        self._resizing = ResizeConfig(**tokenizing["resize"])
        self._clips = tokenizing["clips"]
        self._held_out = held_out
        self._vision = load_vision_tokenizer(run / "vision_tokenizer" / "tokenizer").eval()
        media_of = {sample.key: sample.media for sample in TokenizedFolder.open(run / "codes").samples()}
        self._decoded = {key: self._decode(codes) for key, codes in media_of.items()}
        self._codes = {key: codes.codes_HW for key, codes in media_of.items() if isinstance(codes, Image)}
        self._drawn = {item["caption"]: run / "drawn" / item["file"] for item in _results(run / "drawn")}
        self._written = {Path(item["file"]).stem: item["caption"] for item in _results(run / "captioned")}
        self.pictures = [self._picture_card(path) for path in sorted((media / "images").glob("*.jpg"))]
        self.clips = [self._clip_card(path) for path in sorted((media / "clips").glob("*.mp4"))]

    def right_pictures(self, cards: list[Card]) -> int:
        """How many came out as trained, code for code. Pixels would tell of the decoding too, whose last bits depend on
        the CPU and on what else is in a batch."""
        return sum(card.texts["codes of the original"].startswith("all ") for card in cards)

    def right_captions(self, cards: list[Card]) -> int:
        """How many are captioned as trained, in either language."""
        return sum(
            card.texts["model's caption"] in (card.texts["caption"], card.texts.get("Chinese caption"))
            for card in cards
        )

    def _picture_card(self, path: Path) -> Card:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        chinese = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).get("caption_zh")
        texts = {"caption": caption} | ({"Chinese caption": chinese} if chinese else {})
        texts["model's caption"] = self._written[path.stem].strip() or "(none)"
        drawn_HW = np.load(self._drawn[caption].with_suffix(".codes.npy"))
        right = int((drawn_HW == self._codes[path.stem]).sum())
        texts["codes of the original"] = f"all {right}" if right == drawn_HW.size else f"{right} of {drawn_HW.size}"
        pictures = {
            "original": Picture.fromarray(self._fit(decode_picture(path.read_bytes()))),
            "reconstruction": self._decoded[path.stem][0],
            "generated": Picture.open(self._drawn[caption]).convert("RGB"),
        }
        return Card(pictures=pictures, texts=texts, badge=self._badge(path.stem))

    def _clip_card(self, path: Path) -> Card:
        multiple = self._vision.config.temporal_downsample_factor
        frames = decode_clip(path.read_bytes(), **self._clips, multiple=multiple, resize=self._fit).frames_THWC
        first, last = Picture.fromarray(frames[0]), Picture.fromarray(frames[-1])
        decoded = self._decoded[path.stem]
        pictures = {
            "first frame": first,
            "last frame": last,
            "reconstruction": decoded[0],
            "reconstruction ": decoded[-1],
        }
        texts = {"caption": path.with_suffix(".txt").read_text(encoding="utf-8").strip()}
        return Card(pictures=pictures, texts=texts, badge=self._badge(path.stem))

    def _badge(self, key: str) -> str:
        return "held out" if key in self._held_out else "seen in training"

    def _fit(self, frame_HWC: np.ndarray) -> np.ndarray:
        return resize(frame_HWC, self._resizing, self._vision.config.spatial_factor)

    def _decode(self, media: Image | Video) -> list[Picture.Image]:
        with torch.inference_mode():
            if isinstance(media, Image):
                pixels = self._vision.decode(torch.from_numpy(media.codes_HW).long()[None])
            else:
                pixels = self._vision.decode_chunks(torch.from_numpy(media.codes_THW).long()[None])[0]
        return [Picture.fromarray(frame_HWC) for frame_HWC in to_uint8(pixels)]


def _results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def add_pictures(page: Report, gallery: Gallery) -> None:
    """The cards: seen first, then held out, then clips."""
    page.section(
        "Pictures",
        "Reconstruction: what the vision tokenizer's codes of the original decode to. Generated: what the decoder "
        "draws for the caption, id by id. Model's caption: what it writes when it is shown the original's codes.",
    )
    page.note(MEMORISES)
    page.cards([card for card in gallery.pictures if card.badge == "seen in training"])
    page.section(
        "Pictures the decoder has not seen",
        "Held out from the decoder alone: both tokenizers were trained on all pictures and captions, these too. Their "
        "captions get another picture, their codes another caption.",
    )
    page.cards([card for card in gallery.pictures if card.badge == "held out"])
    page.section("Clips", "Each is a few seconds at four frames per second; four frames share one frame of codes.")
    page.cards(gallery.clips)


def main(argv: list[str]) -> None:
    """Write the report."""
    config = load(QuickstartReportConfig, argv, prog="quickstart_report.py")
    run = Path(config.run)
    settings = yaml.safe_load((run / "decoder" / "config.yaml").read_text())
    names = [f"{source}_{split}" for source in ("media", "prose") for split in ("train", "valid")]
    datasets = {name: DocumentDataset.open(run / "data" / name) for name in names}
    fills = {}
    for name, dataset in datasets.items():
        seq_length = settings["train"]["seq_length"]
        rules = PackingRules(seq_length=seq_length, alignment=settings["data"]["document_alignment"])
        index = pack(dataset.lengths, dataset.sidecar.spans, rules)
        fills[name] = (len(index), index.fill(seq_length))
    sidecar = datasets["media_valid"].sidecar
    held_out = {sidecar.key(document) for document in range(len(sidecar))}
    gallery = Gallery(run, Path(config.media), held_out)
    seen = [card for card in gallery.pictures if card.badge == "seen in training"]
    training, _, _ = load_run(run / "decoder")
    last = {name: statistics.mean(column(training, f"loss_{name}")[1][-SPAN:]) for name in ("text", "vision")}

    page = Report(
        "Emu3 quickstart",
        f"One decoder for text and pictures, trained from nothing on {len(gallery.pictures)} pictures, "
        f"{len(gallery.clips)} clips and a little prose, on this machine.",
    )
    page.facts(
        {
            "seen pictures drawn exactly": f"{gallery.right_pictures(seen)} of {len(seen)}",
            "their captions exact": f"{gallery.right_captions(seen)} of {len(seen)}",
            "last loss, text": f"{last['text']:.3f}",
            "last loss, visual": f"{last['vision']:.3f}",
            "tokens per second": f"{statistics.median(map(tokens_per_second, training)):,.0f}",
            "fill of the windows": f"{fills['media_train'][1]:.1%}",
        }
    )
    add_pictures(page, gallery)
    add_training(page, run)
    add_data(page, datasets, fills)
    page.section("Again, by hand", "TensorBoard has every curve; generate.py draws other captions.")
    page.code(
        f"python -m tensorboard.main --logdir {run}/decoder/tensorboard\n"
        f"python tools/generate.py --task draw --hf {run}/hf --caption '[\"A red parrot.\"]' --grid 12*12 "
        f"--temperature 0 --output {run}/mine"
    )
    print(f"wrote {page.write(run / 'report.html')}")


if __name__ == "__main__":
    run_program(main)
