"""Next-token prediction, weighted by the id of the label (Emu3, arXiv 2409.18869 section 2.4: visual tokens weigh 0.5).

Shape legend: B rows (1), T tokens of this rank's share of the row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.config.objective import ObjectiveConfig, as_fraction
from megatron_ext.data.batch import Batch
from megatron_ext.objectives.base import LossSums
from megatron_ext.vocab import VocabLayout


class NextToken:
    """Weighted next-token loss. Text and structure (EOL, EOF, EOV, ...) weigh 1, visual ids `vision_loss_weight`.

    Weights are integers over a common denominator (0.5 becomes 2 : 1), since megatron-core counts in int32. The
    weighted mean does not change.
    """

    def __init__(self, objective: ObjectiveConfig, layout: VocabLayout) -> None:
        fraction = as_fraction(objective.vision_loss_weight)
        self.text_weight, self.vision_weight = fraction.denominator, fraction.numerator
        self.layout = layout

    def metric_names(self, dataset_names: Sequence[str]) -> tuple[str, ...]:
        """The optimized loss, then unweighted ones per modality and per dataset."""
        return ("loss", "loss_text", "loss_vision", *(f"loss_dataset/{name}" for name in dataset_names))

    def weights(self, labels_BT: Tensor, label_mask_BT: Tensor) -> Tensor:
        """Integer weight of every label, int32; 0 where the mask is False. Decided by the label, never by the input."""
        visual = labels_BT >= self.layout.visual_start
        weights = torch.where(visual, self.vision_weight, self.text_weight)
        return torch.where(label_mask_BT, weights, 0).to(torch.int32)

    def loss(self, batch: Batch, loss_BT: Tensor, dataset_names: Sequence[str]) -> LossSums:
        """The weighted sum, and unweighted sums per modality and per dataset."""
        weights_BT = self.weights(batch.labels_BT, batch.label_mask_BT)
        loss_sum = (loss_BT * weights_BT).sum()
        weight_sum = weights_BT.sum(dtype=torch.int32)
        plain_BT = loss_BT.detach()
        visual_BT = batch.labels_BT >= self.layout.visual_start
        subsets = {
            "loss_text": batch.label_mask_BT & ~visual_BT,
            "loss_vision": batch.label_mask_BT & visual_BT,
        } | {
            f"loss_dataset/{name}": batch.label_mask_BT & (batch.dataset_BT == index)
            for index, name in enumerate(dataset_names)
        }
        # Not plain_BT[mask], which makes a GPU wait for the number of selected tokens.
        metrics = {name: (torch.where(mask, plain_BT, 0).sum(), mask.sum()) for name, mask in subsets.items()}
        return LossSums(loss_sum, weight_sum, {"loss": (loss_sum.detach(), weight_sum), **metrics})
