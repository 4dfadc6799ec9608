"""The windows of an optimizer step as files: their ids, their pictures, and a page that shows both.

FOLDER/windows.npz     what the training step is given: ids_WS, labels_WS and weights_WS of W windows of S ids, in
                       the order of samples; sample_W, data_rank_W, microbatch_W, dataset_W, window_W say which
FOLDER/pictures/*.png  sample-document-segment, counted from 0 in the window; of a clip one picture per frame of
                       codes, side by side
FOLDER/index.html      all of it to look at
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Picture
from rich.console import Console

from megatron_ext.data.loader import Loader
from megatron_ext.data.report import describe_cut, describe_segment, describe_weights, excerpt
from megatron_ext.data.step_windows import DocumentInWindow, StepWindow, documents_in_window
from megatron_ext.files import replacing
from megatron_ext.observe.dataset_page import window_strip
from megatron_ext.observe.painter import Painter
from megatron_ext.observe.progress import progress
from megatron_ext.observe.report import Card, Report
from megatron_ext.vision import MoVQGAN
from megatron_ext.vocab import Text, Vocabulary

PLACES = ("sample", "data_rank", "microbatch", "dataset", "window")
LONGEST_TEXT = 400
"""Characters of a text on the page."""


class StepPage:
    """Writes a folder about a step."""

    def __init__(self, folder: str | Path, loader: Loader, vocabulary: Vocabulary, vision: MoVQGAN | None) -> None:
        """Without `vision` pictures are described, not drawn. `vision` must be the data's."""
        self._folder = Path(folder)
        self._loader = loader
        self._vocabulary = vocabulary
        self._painter = Painter(vision)

    def write(self, windows: Sequence[StepWindow], title: str, facts: Mapping[str, str]) -> Path:
        """Write all three; returns the page's path."""
        (self._folder / "pictures").mkdir(parents=True, exist_ok=True)
        self._write_arrays(windows)
        page = Report(title, "The windows that the ranks are given at this step, read as training reads them.")
        page.facts(facts)
        with progress("windows", len(windows), "windows", Console()) as advance:
            for window in windows:
                self._add_window(page, window)
                advance(1)
        return page.write(self._folder / "index.html")

    def _write_arrays(self, windows: Sequence[StepWindow]) -> None:
        arrays = {f"{name}_W": np.array([getattr(window, name) for window in windows]) for name in PLACES}
        for name in ("ids_S", "labels_S", "weights_S"):
            arrays[name.replace("_S", "_WS")] = np.stack([getattr(window, name) for window in windows])
        with replacing(self._folder / "windows.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def _add_window(self, page: Report, window: StepWindow) -> None:
        packed = self._loader.datasets[window.dataset]
        documents = list(documents_in_window(packed, window.window))
        page.section(
            f"Sample {window.sample:,}",
            f"Data rank {window.data_rank}, microbatch {window.microbatch}: window {window.window:,} of "
            f"{self._loader.dataset_names[window.dataset]}. Labels x weight: {describe_weights(window.weights_S)}.",
        )
        page.strips([window_strip(packed, window.window)])
        rows, cards = [], []
        for number, document in enumerate(documents):
            piece = document.piece
            weights = describe_weights(window.weights_S[piece.begin : piece.begin + piece.length])
            rows.append([piece.begin, piece.length, piece.end - piece.begin - piece.length, document.kind, document.key,
                         weights, describe_cut(document)])  # fmt: skip
            cards.append(self._card(document, f"{window.sample:08d}-{number:03d}"))
        page.table(["from", "ids", "padded", "kind", "key", "labels x weight", "cut"], rows)
        page.cards(cards)

    def _card(self, document: DocumentInWindow, name: str) -> Card:
        """The document as it stands in the window, segment by segment."""
        pictures: dict[str, Picture.Image | None] = {}
        texts = {}
        for number, part in enumerate(document.segments):
            place = f"{part.begin}..{part.end - 1}"
            if isinstance(part.segment, Text):
                texts[place] = excerpt(self._vocabulary.text.decode(part.segment.ids), LONGEST_TEXT)
                continue
            texts[place] = describe_segment(part.segment, self._vocabulary)
            if self._painter.vision is not None:
                frames = self._painter.frames(part.segment)
                _write_strip(frames, self._folder / "pictures" / f"{name}-{number:03d}.png")
                shown = {place: frames[0]} | ({f"{place}, last frame": frames[-1]} if len(frames) > 1 else {})
                pictures |= {label: Picture.fromarray(frame_HWC) for label, frame_HWC in shown.items()}
        return Card(pictures=pictures, texts={"key": document.key, **texts}, badge=document.kind)


def _write_strip(frames_THWC: np.ndarray, path: Path) -> None:
    with replacing(path) as temporary:
        Picture.fromarray(np.concatenate(list(frames_THWC), axis=1)).save(temporary, format="PNG")
