"""How much of a picture is covered by text: PP-OCR's text detector, through rapidocr.

Shapes: H W pixels, C colour channels.
"""

import functools
import importlib.util
from typing import Any

import cv2
import numpy as np

from megatron_ext.config import InputError
from megatron_ext.curate.colour import reduced

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""As the detector was trained (`NormalizeImage` in the inference.yml of PaddleOCR's detection models; PaddleOCR issue
18218 for PP-OCRv6). rapidocr's own default of 0.5 finds text in 19 of 40 photographs without any, this in 15."""

TALLEST = 0.25
"""Height of a line of text at most, as a share of the picture's shorter edge. Since PP-OCRv5 the detector takes whole
textures for text (PaddleOCR issue 15374): on 40 photographs and wallpapers, all boxes on photographs but one were at
least 0.47 high."""

LEAST_SIDE = 32
"""Pixels: smaller pictures are enlarged by rapidocr, which the detector's steps of 32 demand."""


def text_share(picture_HWC: np.ndarray, shorter_edge: int) -> float:
    """Share of the area of a uint8 RGB picture that boxes of text lines cover, 0 to 1; overlaps count once.

    The picture is looked at with its shorter edge reduced to `shorter_edge` pixels: what is too small to be read there
    does not count.
    `check_installed` says whether it can be asked.
    """
    picture_HWC = reduced(picture_HWC, shorter_edge)
    bgr_HWC = np.ascontiguousarray(picture_HWC[..., ::-1])
    boxes = _detector()(bgr_HWC, use_det=True, use_cls=False, use_rec=False).boxes
    mask_HW = np.zeros(picture_HWC.shape[:2], dtype=np.uint8)
    for corners in boxes if boxes is not None else ():
        sides = np.linalg.norm(np.roll(corners, -1, axis=0) - corners, axis=1)
        if min(sides) <= TALLEST * min(mask_HW.shape):
            cv2.fillPoly(mask_HW, [np.round(corners).astype(np.int32)], 1)
    return float(mask_HW.mean())


def check_installed(turn_off: str) -> None:
    """Raise InputError where the detector is not installed; `turn_off` is the option that does without it."""
    missing = [name for name in ("rapidocr", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"text detection needs {' and '.join(missing)}: pip install 'megatron-ext-emu3[curate]' and pip install "
            f"--no-deps rapidocr, or turn it off with {turn_off}"
        )


@functools.cache
def _detector() -> Any:
    """The detector with one thread: other processes look at other pictures."""
    from rapidocr import RapidOCR  # here: it takes a second, and only who looks for text needs it

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Det.limit_side_len": LEAST_SIDE,
            "Det.mean": list(MEAN),
            "Det.std": list(STD),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
