"""Weights are decided by the label; sums equal a plain loop."""

import pytest
import torch

from megatron_ext.config.objective import ObjectiveConfig
from megatron_ext.data.batch import Batch
from megatron_ext.objectives import NextToken
from megatron_ext.vocab import VocabLayout

LAYOUT = VocabLayout.custom(text_size=20, codebook_size=10)
TEXT, EOL, VISUAL = 3, LAYOUT.eol, LAYOUT.visual_start


def batch_of(labels, mask, datasets, tokens=None):
    row = torch.tensor([labels])
    return Batch(
        tokens_BT=torch.tensor([tokens or labels]), labels_BT=row, position_ids_BT=torch.zeros_like(row),
        label_mask_BT=torch.tensor([mask], dtype=torch.bool), dataset_BT=torch.tensor([datasets]),
        cu_seqlens=torch.tensor([0, len(labels)], dtype=torch.int32), max_seqlen=len(labels), num_windows=1,
    )  # fmt: skip


def test_sums_equal_a_plain_loop():
    labels, mask, datasets = [TEXT, VISUAL, EOL, VISUAL + 9, LAYOUT.eov, TEXT], [1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]
    loss_BT = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    sums = NextToken(ObjectiveConfig(), LAYOUT).loss(batch_of(labels, mask, datasets), loss_BT, ("a", "b"))
    # Weights 1 and 0.5 as integers 2 and 1; the last label is masked.
    assert sums.loss_sum.item() == 2 * 1 + 1 * 2 + 2 * 4 + 1 * 8 + 2 * 16
    assert sums.weight_sum.item() == 2 + 1 + 2 + 1 + 2
    assert sums.weight_sum.dtype == torch.int32
    measured = {name: (total.item(), count.item()) for name, (total, count) in sums.metrics.items()}
    assert measured == {
        "loss": (52, 8), "loss_text": (21, 3), "loss_vision": (10, 2),
        "loss_dataset/a": (7, 3), "loss_dataset/b": (24, 2),
    }  # fmt: skip


def test_the_label_decides_not_the_input():
    objective = NextToken(ObjectiveConfig(), LAYOUT)
    batch = batch_of([TEXT, VISUAL], [1, 1], [0, 0], tokens=[VISUAL, TEXT])
    assert objective.weights(batch.labels_BT, batch.label_mask_BT).tolist() == [[2, 1]]
    sums = objective.loss(batch, torch.tensor([[1.0, 10.0]]), ("a",))
    assert sums.loss_sum.item() == 2 * 1 + 1 * 10
    assert sums.metrics["loss_text"][0].item() == 1 and sums.metrics["loss_vision"][0].item() == 10


def test_metric_names_are_what_loss_returns():
    objective = NextToken(ObjectiveConfig(), LAYOUT)
    sums = objective.loss(batch_of([TEXT], [1], [0]), torch.ones(1, 1), ("x",))
    assert tuple(sums.metrics) == objective.metric_names(("x",))


@pytest.mark.parametrize(
    ("weight", "integers"), [(0.5, (2, 1)), (1.0, (1, 1)), (0.25, (4, 1)), (0.0, (1, 0)), (0.35, (20, 7))]
)
def test_weights_are_integers_over_a_small_denominator(weight, integers):
    objective = NextToken(ObjectiveConfig(vision_loss_weight=weight), LAYOUT)
    assert (objective.text_weight, objective.vision_weight) == integers
