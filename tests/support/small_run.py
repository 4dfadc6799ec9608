"""What pretrain_emu3.py needs to train something tiny, written into a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.unit.data.samples import CODEBOOK_SIZE, make_vocabulary, random_dataset, train_text_tokenizer


@dataclass(frozen=True)
class Place:
    """One of two data ranks, as the loader needs to know it."""

    data_parallel_rank: int
    data_parallel_size: int = 2
    context_parallel_rank: int = 0
    context_parallel_size: int = 1


def write_small_run(folder: Path) -> dict[str, Any]:
    """A text tokenizer, datasets `train` and `valid` and config.yaml; returns what config.yaml holds."""
    model = train_text_tokenizer()
    (folder / "text.model").write_bytes(model)
    for name, seed in (("train", 0), ("valid", 1)):
        random_dataset(folder / name, make_vocabulary(model), seed=seed)
    config = {
        "vocab": {"layout": "custom", "text_tokenizer": str(folder / "text.model"), "codebook_size": CODEBOOK_SIZE},
        "model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2,
                  "num_query_groups": 1, "kv_channels": 8},
        "train": {"seq_length": 64, "global_batch_size": 4, "train_steps": 4},
        "data": {"train": [{"prefix": str(folder / "train")}], "document_alignment": 4},
        "observe": {"tensorboard": False},  # two seconds of imports
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return config
