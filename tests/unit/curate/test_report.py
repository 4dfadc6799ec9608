"""The page of a curation."""

import re

import numpy as np
from PIL import Image

from megatron_ext.curate.report import CurationPage, Score, choose_examples, funnel_rows, write_page


def test_the_page_tells_all(tmp_path):
    rows = [{"key": f"k{i}", "detail": f"aesthetic {i} is below 5.5"} for i in range(4)]
    page = CurationPage(
        title="Curation",
        lead="Pictures.",
        facts={"inputs": "10"},
        funnel=[("pictures", 10), ("resolution", 3), ("aesthetic", 2)],
        off={"aesthetic": "no weight file"},
        scores=[
            Score(
                label="score", kept=np.array([6.0, np.nan]), dropped=np.array([5.0]), thresholds={5.5: "kept from 5.5"}
            ),
            Score(label="nothing", kept=np.array([np.nan]), dropped=np.array([])),
        ],
        examples={"Dropped: aesthetic": rows, "Kept": []},
    )
    shown = {"k1": Image.new("RGB", (400, 200))}
    path = write_page(page, tmp_path / "report.html", lambda row: shown.get(row["key"]))
    text = path.read_text(encoding="utf-8")
    for part in ("Filter aesthetic was off: no weight file", "kept from 5.5", "nothing: not measured", "50.0 %",
                 "aesthetic 3 is below 5.5", "<svg", "data:image/png"):  # fmt: skip
        assert part in text, part
    assert "<h2>Kept" not in text and len(re.findall("<img", text)) == 1
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]


def test_the_funnel_adds_up():
    rows = funnel_rows([("pictures", 8), ("resolution", 2), ("aesthetic", 5)])
    assert rows == [("pictures", 0, 8, "100.0 %"), ("resolution", 2, 6, "75.0 %"), ("aesthetic", 5, 1, "12.5 %")]
    assert funnel_rows([("pictures", 0)]) == [("pictures", 0, 0, "100.0 %")]


def test_examples_do_not_depend_on_the_order():
    rows = [{"key": str(i)} for i in range(100)]
    chosen = choose_examples(rows, 5)
    assert chosen == choose_examples(rows[::-1], 5) and chosen != rows[:5]
