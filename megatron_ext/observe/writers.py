"""Where metrics go: JSON lines, TensorBoard, the console. Each takes the same dictionary and knows no other."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from megatron_ext.files import read_json_lines, replacing

CONSOLE_LABELS = {
    "loss": "loss",
    "loss_text": "text",
    "loss_vision": "vision",
    "grad_norm": "grad",
    "learning_rate": "lr",
}


class JsonLines:
    """An append-only file of one JSON object per line; every line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        """Open to append. A last line that a kill cut short is removed."""
        self.path = path
        _remove_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`. Tensors of one element become numbers; NaN and infinities, which JSON lacks, become null."""
        self._file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Keep the lines whose `step` is at most `step`; the file is replaced at once, by rename."""
        kept = [record for record in read_json_lines(self.path) if record.get("step", 0) <= step]
        self._file.close()
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()


class TensorBoard:
    """Scalars in TensorBoard event files. The file is opened at the first scalar, when the resumed step is known."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def truncate_after(self, step: int) -> None:
        """Make TensorBoard forget what an earlier start logged after `step`."""
        self.close()
        self._purge_step = step + 1

    def write(self, record: Mapping[str, Any]) -> None:
        """Log every number of `record` under its key, `timing` as `timing/NAME`, at `record["step"]`."""
        for name, value in flat(counted(record)).items():
            if name != "step" and isinstance(value, int | float):
                self._opened().add_scalar(name, value, record["step"])

    def write_picture(self, name: str, path: Path, step: int) -> None:
        """Log the picture file at `path`."""
        with Image.open(path) as picture:
            self._opened().add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def _opened(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # 2 s of import: only where it is wanted

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, flush_secs=10)
        return self._writer

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ConsoleLines:
    """One readable line every `interval` training steps, and one for every evaluation."""

    def __init__(self, console: Console, interval: int, total_steps: int | None) -> None:
        self._console = console
        self._interval = interval
        self._total_steps = total_steps
        # The recent past, evaluations and checkpoints included: an ETA from step times alone is too hopeful.
        self._times: deque[tuple[int, float]] = deque(maxlen=64)
        self._rates: list[float] = []

    def write(self, record: Mapping[str, Any]) -> None:
        """Print a line when one is due."""
        record = counted(record)
        step = record["step"]
        if "loss" not in record:
            self._print(
                step, [f"{name} {_number(value)}" for name, value in record.items() if name.startswith("valid")]
            )
            return
        self._times.append((step, time.monotonic()))
        rate = record.get("timing", {}).get("tokens_per_second")
        if rate:
            self._rates.append(rate)
        if step % self._interval == 0 or step == self._total_steps:
            self._print(step, self._training_parts(record))
            self._rates.clear()

    def _training_parts(self, record: Mapping[str, Any]) -> list[str]:
        parts = [f"{label} {_number(record[name])}" for name, label in CONSOLE_LABELS.items() if name in record]
        if self._rates:
            parts.append(f"{sum(self._rates) / len(self._rates):,.0f} tokens/s")
        remaining = self._seconds_left()
        if remaining is not None:
            parts.append(f"ETA {duration(remaining)}")
        return parts

    def _seconds_left(self) -> float | None:
        if self._total_steps is None or len(self._times) < 2:
            return None
        (first, began), (last, ended) = self._times[0], self._times[-1]
        return (self._total_steps - last) * (ended - began) / max(last - first, 1)

    def _print(self, step: int, parts: list[str]) -> None:
        total = f"/{self._total_steps}" if self._total_steps is not None else ""
        width = len(str(self._total_steps or step))
        self._console.print(" | ".join([f"step {step:>{width}}{total}", *parts]), markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds for people: `8s`, `2m05s`, `3h07m`, `4d02h`."""
    seconds = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // lower_size:02d}{lower}"
    return f"{seconds}s"


def _remove_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def plain(value: Any) -> Any:
    """`value` as what JSON can hold: tensors of one element become numbers, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by `/`, tensors of one element as numbers."""
    values = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{name}/"))
        else:
            values[prefix + name] = value.item() if hasattr(value, "item") else value
    return values


def counted(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` without the means over nothing: parts of a loss that are NaN while the loss itself is a number, such as
    that of visual labels in a step of texts."""

    def is_empty(name: str, value: Any) -> bool:
        before, part, _ = name.partition("loss_")
        total = record.get(f"{before}loss")
        return bool(part) and total is not None and math.isnan(value) and not math.isnan(total)

    return {name: value for name, value in record.items() if not is_empty(name, value)}


def _number(value: Any) -> str:
    value = float(value)
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.4f}"
    return f"{value:.2e}"
