"""200 steps of a tiny decoder on one process, kept in git: `python -m tests.distributed.golden` compares with them,
`--write` replaces them. CHANGELOG.md must then say why, and quote their digest."""

import argparse
import hashlib
import json
from pathlib import Path

from megatron_ext.data.batch import Window
from tests.support.comparison import largest_difference
from tests.support.decoding import History, random_window, train_losses

PATH = Path(__file__).with_name("golden.json")
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
STEPS, NUM_WINDOWS, WINDOWS_A_STEP = 200, 16, 4


def sixteen_windows(step: int) -> list[Window]:
    """The same 16 windows in turn, so that there is something to learn: by heart."""
    return [random_window((step * WINDOWS_A_STEP + index) % NUM_WINDOWS) for index in range(WINDOWS_A_STEP)]


TRAINING = {
    "steps": STEPS,
    "windows": sixteen_windows,
    "micro_batch_size": 2,
    "model": {"num_attention_heads": 8, "qk_layernorm": True},
    "optim": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_steps": 20, "lr_decay_style": "cosine", "clip_grad": 1.0},
}


def train() -> History:
    """The golden training, in this process."""
    return train_losses({}, **TRAINING)[0]


def read() -> History:
    """The steps that are in git."""
    saved = json.loads(PATH.read_text(encoding="utf-8"))
    return [dict(zip(saved["columns"], values, strict=True)) for values in saved["steps"]]


def write(history: History) -> None:
    """One line per step, eight digits."""
    lines = ",\n".join(json.dumps([float(f"{value:.8g}") for value in step.values()]) for step in history)
    text = f'{{"columns": {json.dumps(list(history[0]))}, "steps": [\n{lines}\n]}}\n'
    PATH.write_text(text, encoding="utf-8")


def digest() -> str:
    """Of the file in git; CHANGELOG.md quotes it."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the golden steps with what this tree computes")
    arguments = parser.parse_args()
    history = train()
    if PATH.exists():
        print(f"largest relative difference from {PATH.name}: {largest_difference(history, read()):.1e}")
    if arguments.write:
        write(history)
        print(f"wrote {PATH.name}; CHANGELOG.md needs a line that says why and holds: golden training `{digest()}`")


if __name__ == "__main__":
    main()
