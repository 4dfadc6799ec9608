"""The report: self-contained, escaped, the same bytes for the same content."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from megatron_ext.observe.report import Card, Report, curves, histogram, smooth


def sample_report() -> Report:
    page = Report("A <title>", "What it shows & why.")
    page.facts({"tokens/s": "4,000"})
    page.section("Training", "Loss by step.")
    lines = {"text": ([1, 2, 3], [3.0, 2.0, 1.0]), "vision": ([1, 2, 3], [5.0, 4.0, float("nan")])}
    page.figure(curves(lines, x_label="step", y_label="loss", marks={2: "layout changes"}, log_y=True), "Both fall.")
    page.table(["name", "count"], [["a", 1234567], ["b", 2]])
    page.note("It memorises.")
    page.code("make quickstart")
    picture = Image.new("RGB", (8, 8), (200, 30, 30))
    page.cards(
        [Card(pictures={"original": picture, "generated": None}, texts={"caption": "<b>红</b>"}, badge="held out")]
    )
    return page


class Collector(HTMLParser):
    """Tags with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_needs_no_other_file(tmp_path):
    html = sample_report().write(tmp_path / "report.html").read_text(encoding="utf-8")
    collector = Collector()
    collector.feed(html)
    references = [a.get("src") or a.get("href") or a.get("xlink:href") for _, a in collector.tags]
    assert all(item.startswith(("data:", "#")) for item in references if item)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in collector.tags}
    assert "url(http" not in html and "@import" not in html


def test_texts_are_escaped(tmp_path):
    html = sample_report().write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in html and "&lt;b&gt;红&lt;/b&gt;" in html
    assert "<b>红" not in html


def test_pictures_and_figures_are_inline(tmp_path):
    html = sample_report().write(tmp_path / "report.html").read_text(encoding="utf-8")
    (encoded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((0, 0)) == (200, 30, 30)
    assert html.count("<svg") == 1 and "layout changes" in html
    assert "#010203" not in html and "currentColor" in html
    assert "1,234,567" in html


def test_same_content_same_bytes(tmp_path):
    first = sample_report().write(tmp_path / "a.html").read_bytes()
    assert first == sample_report().write(tmp_path / "b.html").read_bytes()


def test_smooth():
    assert smooth([1.0, 2.0, 3.0, 6.0], 2) == pytest.approx([1.0, 1.5, 2.5, 4.5])
    assert smooth([4.0], 8) == [4.0]


def test_equal_values_of_a_histogram_can_be_seen():
    """Beside a mark far away: their one bin is a fiftieth of what is shown, not of nothing."""
    figure = histogram({"kept": [256.0] * 5, "dropped": []}, x_label="side", y_label="inputs", marks={64.0: "least"})
    [bar] = [patch for patch in figure.axes[0].patches if patch.get_height()]
    assert bar.get_height() == 5 and bar.get_width() == pytest.approx((256 - 64) / 50)
