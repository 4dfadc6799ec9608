"""The pages that programs write, as a browser shows them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Picture

import pretrain_emu3
from megatron_ext.config import load
from megatron_ext.config.run import RunConfig
from megatron_ext.data import DocumentDataset
from megatron_ext.observe.report import COLORS, Card, Report
from megatron_ext.vision import MoVQGAN, load_vision_tokenizer, save_vision_tokenizer
from megatron_ext.vocab import Image, Text
from tests.integration.test_quickstart_report import quickstart_report
from tests.support.browser import Box, BrowserPage
from tests.support.small_models import CODEBOOK_SIZE, VISION, small_vocabulary
from tests.support.small_run import write_small_run
from tests.unit.data.samples import write_dataset
from tools import inspect_data, run_report

STEPS, STOPPED = 12, 5


def luminance_range(picture_HWC: np.ndarray) -> int:
    """Of a blank picture 0."""
    grey = picture_HWC.mean(axis=-1)
    return int(grey.max() - grey.min())


def pixels_like(picture_HWC: np.ndarray, color: str) -> int:
    """How many pixels have `color` ("#rrggbb"), within what antialiasing leaves."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(picture_HWC.astype(int) - wanted).max(axis=-1) <= 24).sum())


def assert_healthy(page: BrowserPage, figures: int) -> list[Box]:
    """The page asks for nothing, complains of nothing, fits its window, and its figures are drawn; their places."""
    assert page.errors == [] and page.requests == []
    assert page.overflow() == 0
    places = page.boxes("figure > svg")
    assert len(places) == figures
    for place in places:
        assert place.width > 300 and place.height > 100
        assert luminance_range(page.screenshot(place)) > 100
    return places


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two datasets that was stopped and started again."""
    folder = tmp_path_factory.mktemp("pages")
    config = write_small_run(folder)
    config["data"]["train"] = [{"prefix": str(folder / name)} for name in ("train", "valid")]
    config["data"]["valid"] = [{"prefix": str(folder / "valid")}]
    config["train"] |= {"train_steps": STEPS, "eval_interval": 4, "eval_steps": 1}
    config["optim"] = {"lr": 1e-2, "lr_warmup_steps": 1, "lr_decay_style": "constant"}
    config["checkpoint"] = {"async_save": False}
    config["runtime"] = {"device": "cpu"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(folder / "config.yaml"), "--observe.run_dir", str(folder / "run")]
    pretrain_emu3.train(load(RunConfig, [*options, "--train.exit_interval", str(STOPPED)]))
    pretrain_emu3.train(load(RunConfig, options))
    return folder / "run"


def test_the_report_of_a_run(run, browser):
    run_report.main(["--run", str(run)])
    with browser.page(run / "report.html") as page:
        places = assert_healthy(page, figures=6)
        assert page.texts("h2") == ["Losses", "Speed", "Starts", "Where the time went", "Events"]
        drawn = page.screenshot(places[0])
        for color in ("#3f7fc4", "#d9742b"):  # text and vision
            assert pixels_like(drawn, color) > 200
        by_kind = page.screenshot(places[4])  # embedding, attention, mlp, norms, head
        assert all(pixels_like(by_kind, color) > 100 for color in COLORS[:5])
        assert "training" in page.texts(".legend span") and "steps done again" in page.texts("td")
        assert f"{STOPPED} to {STEPS}" in page.texts("td") and "goodput" in page.texts(".facts span")
        page.dark()
        assert page.screenshot()[2, 2].max() < 64
        assert luminance_range(page.screenshot(places[0])) > 100
    with browser.page(run / "report.html", width=420) as page:
        assert page.overflow() == 0


def test_the_quickstarts_report(run, tmp_path, browser):
    """Its sections on the tiny run; its gallery as cards of plain colours."""
    (tmp_path / "decoder").symlink_to(run)
    page = Report("Quickstart", "What it did.")
    colors = {"seen in training": (200, 30, 30), "held out": (30, 30, 200)}
    page.cards([
        Card(pictures={"original": Picture.new("RGB", (64, 64), color), "generated": None},
             texts={"caption": "一只红色的狐狸"}, badge=badge)
        for badge, color in colors.items()
    ])  # fmt: skip
    quickstart_report.add_training(page, tmp_path)
    quickstart_report.add_data(page, {"train": DocumentDataset.open(run.parent / "train")}, {"train": (12, 0.875)})
    with browser.page(page.write(tmp_path / "report.html")) as seen:
        assert_healthy(seen, figures=3)  # losses, throughput, held out
        assert seen.texts("h2") == ["Training", "Data"] and "87.5%" in seen.texts("td")
        drawn = [seen.screenshot(box) for box in seen.boxes(".card img")]
        assert [tuple(picture[40, 40]) for picture in drawn] == list(colors.values())
        assert seen.texts(".badge") == list(colors) and seen.texts(".card dd") == ["一只红色的狐狸"] * 2


def write_pictures(folder: Path) -> None:
    """A vision tokenizer, and documents of its codes and two languages' captions: dataset `media`; prose: `prose`."""
    torch.manual_seed(0)
    save_vision_tokenizer(MoVQGAN(VISION), folder / "vision")
    identity = load_vision_tokenizer(folder / "vision").identity
    vocabulary, rng = small_vocabulary(), np.random.default_rng(0)
    captions = ("A red fox runs through the snow.", "一只红色的狐狸在雪地里奔跑。", "<script>alert(1)</script> & more")
    pictures = [
        [Text(vocabulary.text.encode(captions[number % 3])), Image(rng.integers(0, CODEBOOK_SIZE, (4, 5)))]
        for number in range(12)
    ]
    write_dataset(folder / "media", vocabulary, pictures, identity)
    long = "for i in range(10): print(i)  5 foxes, 64 foxes. " * 40
    write_dataset(folder / "prose", vocabulary, [[Text(vocabulary.text.encode(long))]] * 3, None)


def test_the_page_of_datasets(tmp_path, browser, capsys):
    write_pictures(tmp_path)
    shown = ["--documents_shown", "6", "--windows_shown", "4", "--seq_length", "256"]
    both = f'["{tmp_path}/media","{tmp_path}/prose"]'
    arguments = ["--prefix", both, *shown, "--output", str(tmp_path / "page")]
    inspect_data.main([*arguments, "--vision_tokenizer", str(tmp_path / "vision")])
    table = capsys.readouterr().out
    assert "media" in table and "prose" in table and "fill" in table and "95 %" in table
    with browser.page(tmp_path / "page" / "index.html") as page:
        assert_healthy(page, figures=1)
        assert page.texts("h2") == ["What it is made of", "Documents of media", "Documents of prose", "Windows"]
        assert len(page.boxes("article.flow")) == 6 + 3
        first = page.texts("article.flow:first-of-type .token, article.flow:first-of-type .words")[:9]
        # BOS, text, SOV, meta, SOT, the picture, then what ends its rows, its frame, the block and the document
        assert first == [
            "BOS",
            "A red fox runs through the snow.",
            "SOV",
            "4*5",
            "SOT",
            "4 × EOL",
            "1 × EOF",
            "EOV",
            "EOS",
        ]
        assert "<script>alert(1)</script> & more" in page.texts(".words")
        (picture, *others) = page.boxes(".shown img")
        assert len(others) == 5 and picture.height >= 100 and luminance_range(page.screenshot(picture)) > 20
        strips = page.boxes("svg.strip")
        assert len(strips) >= 2
        blue, orange = (pixels_like(page.screenshot(strips[0]), color) for color in ("#3f7fc4", "#d9742b"))
        assert blue > 200 and orange > 200 and strips[0].width > 500
        titles = page.texts("svg.strip title")
        assert all(
            re.fullmatch(r"(text|image), [0-9,]+ ids at [0-9,]+: document \d+, key/\d+", title) for title in titles
        )
        page.dark()
        assert page.screenshot()[2, 2].max() < 64
    with browser.page(tmp_path / "page" / "index.html", width=420) as page:
        assert page.overflow() == 0


def test_a_page_without_a_vision_tokenizer_draws_codes(tmp_path, browser):
    write_pictures(tmp_path)
    inspect_data.main(["--prefix", str(tmp_path / "media"), "--output", str(tmp_path / "page")])
    with browser.page(tmp_path / "page" / "index.html") as page:
        assert_healthy(page, figures=1)
        codes = page.boxes("img.codes")
        assert len(codes) == 12
        _, counts = np.unique(page.screenshot(codes[0]).reshape(-1, 3), axis=0, return_counts=True)
        counts = np.sort(counts)[::-1]
        assert counts[9] > 100 and counts[:20].sum() > 0.8 * counts.sum()  # 20 flat squares, whose edges may blend
        assert not page.boxes("svg.strip")
