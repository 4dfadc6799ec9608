"""What keeps a codebook from collapsing: k-means placement, restart of dead codes, moving averages, and how it fares.

Emu3's own initial codes, U(-1/K, 1/K), lie in a cube far smaller than the latents: a few of them win every latent, and
the commitment loss then pulls the encoder onto those few.

Ranks hold parts of a batch. Everything here is the same on all of them, and the same as on one rank with the joined
batch, to the last bit: latents are added up as integers, whose sums depend on no order.

Shapes: N vectors, D vector size, K codes; P parts of a batch (micro-batches), R ranks.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_ext.config import InputError
from megatron_ext.vision.quantizer import Quantizer, nearest_codes
from tokenizer_train.vision.config import CodebookConfig
from tokenizer_train.vision.data import torch_generator

FRACTION_BITS = 28
"""Binary digits after the point of latents that are added up: 4e-9, a sixteenth of float32's rounding at 1. 64 bits
hold the sum of a million latents of size 16,000; larger ones are refused."""

LARGEST_SUM = 2.0 ** (62 - FRACTION_BITS)

USAGE_WINDOW = 100
"""Steps over which codes_used counts where nothing is restarted."""


class Peers(Protocol):
    """What the codebook needs of the other ranks."""

    rank: int
    count: int

    def total(self, value: Tensor) -> Tensor:
        """The sum of the ranks' `value`, int64 or float32, as a new tensor."""


class OneRank:
    """No others."""

    rank, count = 0, 1

    def total(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value.clone()


ALONE = OneRank()


class SharedRows:
    """Vectors of all ranks as one table, in the order of the joined batches: by part, then by rank.

    Each rank keeps its own; any of them can be asked for.
    """

    def __init__(self, parts: Sequence[Tensor], peers: Peers = ALONE) -> None:
        """`parts` [N, D] of this rank, as many on each rank, N at will."""
        self.own_ND = torch.cat(list(parts))
        self.peers = peers
        device = self.own_ND.device
        sizes_PR = torch.zeros(len(parts), peers.count, dtype=torch.int64, device=device)
        sizes_PR[:, peers.rank] = torch.tensor([len(part) for part in parts], device=device)
        sizes_PR = peers.total(sizes_PR)
        starts_PR = (sizes_PR.flatten().cumsum(0) - sizes_PR.flatten()).view_as(sizes_PR)
        self.count = int(sizes_PR.sum())
        places = [
            start + torch.arange(len(part), device=device)
            for start, part in zip(starts_PR[:, peers.rank], parts, strict=True)
        ]
        self._places_N = torch.cat(places)

    def random(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, D]: random rows, different ones where there are enough; the same on every rank."""
        if self.count >= count:
            wanted = torch.randperm(self.count, generator=generator)[:count]
        else:
            wanted = torch.randint(self.count, (count,), generator=generator)
        wanted = wanted.to(self.own_ND.device)
        found = torch.searchsorted(self._places_N, wanted).clamp(max=len(self._places_N) - 1)
        is_own = self._places_N[found] == wanted
        return self.peers.total(torch.where(is_own[:, None], self.own_ND[found], 0))

    def sums(self, codes_N: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
        """(how many rows of all ranks have each code [K], int64; their sum [K, D], float64).

        Raises:
            InputError: latents so large that their sum would not be exact.
        """
        rows_ND = self.own_ND.double()
        # Compared on every rank after the sum, so that all of them stop.
        largest = self.peers.total(rows_ND.abs().amax().nan_to_num(nan=torch.inf).float()) * self.count
        if not largest < LARGEST_SUM:
            raise InputError(
                f"{self.count} latents add up to {largest.item():.2g}: the training has diverged; lower the learning "
                "rate, clip the gradients (optim.clip_grad), or look at the media"
            )
        whole_KD = torch.zeros(num_codes, rows_ND.shape[1], dtype=torch.int64, device=rows_ND.device)
        whole_KD.index_add_(0, codes_N, (rows_ND * 2.0**FRACTION_BITS).round().long())
        sizes_K = torch.bincount(codes_N, minlength=num_codes)
        return self.peers.total(sizes_K), self.peers.total(whole_KD).double() / 2.0**FRACTION_BITS


@torch.no_grad()
def kmeans(rows: SharedRows, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """[count, D]: centres of Lloyd's algorithm from random vectors; an empty cluster restarts at a random one."""
    centres_KD = rows.random(count, generator)
    for _ in range(iterations):
        sizes_K, sums_KD = rows.sums(nearest_codes(rows.own_ND, centres_KD), count)
        means_KD = (sums_KD / sizes_K.clamp(min=1)[:, None]).to(centres_KD.dtype)
        centres_KD = torch.where((sizes_K > 0)[:, None], means_KD, rows.random(count, generator))
    return centres_KD


@torch.no_grad()
def restart_codes(
    weight_KD: Tensor, dead_K: Tensor, rows: SharedRows, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Move the codes in `dead_K` (bool) onto random latents.

    The optimizer forgets their momentum, which would carry them on in the direction of their former place.
    """
    dead = dead_K.nonzero().squeeze(1)
    weight_KD[dead] = rows.random(len(dead), generator).to(weight_KD.dtype)
    for name, moment in optimizer.state.get(weight_KD, {}).items():
        if name != "step":
            moment[dead] = 0


@torch.no_grad()
def move_to_averages(weight_KD: Tensor, mass_K: Tensor, sizes_K: Tensor, sums_KD: Tensor, decay: float) -> None:
    """Codes become moving averages of the latents that choose them (van den Oord et al. 2017, appendix A.1).

    The paper's sums m = N e need no memory of their own: with N (`mass_K`) before the step and n, s of the step,
    e' = (decay N e + (1 - decay) s) / (decay N + (1 - decay) n). A code without latents stays, whatever its N.
    """
    old_K1, new_K1 = decay * mass_K.double()[:, None], (1 - decay) * sizes_K.double()[:, None]
    moved_KD = (old_K1 * weight_KD.double() + (1 - decay) * sums_KD) / (old_K1 + new_K1).clamp(min=1e-30)
    weight_KD.copy_(torch.where((sizes_K > 0)[:, None], moved_KD.to(weight_KD.dtype), weight_KD))


def perplexity(counts_K: Tensor) -> float:
    """exp of the entropy of how often each code is used: K when all are used equally."""
    share_K = counts_K.double() / counts_K.sum().clamp(min=1)
    return float(torch.special.entr(share_K).sum().exp())


class CodebookKeeper:
    """Looks after one codebook during training; every rank has one and calls it with the others.

    Make it before the tokenizer is given to DDP: a codebook of moving averages takes no gradient from then on.
    """

    def __init__(self, config: CodebookConfig, quantizer: Quantizer, seed: int, peers: Peers = ALONE) -> None:
        self.config = config
        self.weight_KD = quantizer.embedding.weight
        self.seed = seed
        self.peers = peers
        if config.update == "ema":
            self.weight_KD.requires_grad_(False)
        num_codes, device = len(self.weight_KD), self.weight_KD.device
        self.counts_K = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.average_K = torch.zeros(num_codes, dtype=torch.float64, device=device)

    @torch.no_grad()
    def place(self, parts: Sequence[Tensor]) -> None:
        """Put the codes where k-means finds the latents of `parts` ([N, D] each, this rank's)."""
        generator = torch_generator(self.seed, "kmeans")
        rows = SharedRows(parts, self.peers)
        self.weight_KD.copy_(kmeans(rows, len(self.weight_KD), self.config.kmeans_iterations, generator))

    @torch.no_grad()
    def note(
        self, step: int, codes: Sequence[Tensor], latents: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        """After the optimizer's step `step`: its micro-batches' `codes` (any shape) and `latents` ([N, D]); metrics."""
        config = self.config
        codes_N = torch.cat([part.flatten() for part in codes])
        if config.update == "ema":
            sizes_K, sums_KD = SharedRows(latents, self.peers).sums(codes_N, len(self.weight_KD))
        else:
            sizes_K = self.peers.total(torch.bincount(codes_N, minlength=len(self.weight_KD)))
        if not self.average_K.any():
            self.average_K.fill_(float(sizes_K.sum()) / len(sizes_K))
        if config.update == "ema":
            move_to_averages(self.weight_KD, self.average_K, sizes_K, sums_KD, config.ema_decay)
        self.average_K.lerp_(sizes_K.double(), 1 - config.ema_decay)
        self.counts_K += sizes_K
        line = {"codes_perplexity": perplexity(sizes_K), "codes_perplexity_average": perplexity(self.average_K)}
        if (step - config.start_step) % (config.restart_interval or USAGE_WINDOW) == 0:
            line["codes_used"] = int((self.counts_K > 0).sum())
            if config.restart_interval and step <= config.restart_until_step:
                line["codes_restarted"] = self._restart(step, latents, optimizer)
            self.counts_K.zero_()
        return line

    def _restart(self, step: int, latents: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
        dead_K = self.counts_K == 0
        count = int(dead_K.sum())
        if count:
            generator = torch_generator(self.seed, "restart", step)
            restart_codes(self.weight_KD, dead_K, SharedRows(latents, self.peers), optimizer, generator)
            # As heavy as the mean code, or the first latent would drag a code of no mass onto itself.
            self.average_K[dead_K] = self.average_K.mean()
        return count

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside the codes themselves."""
        return {"counts_K": self.counts_K, "average_K": self.average_K}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.counts_K.copy_(state["counts_K"])
        self.average_K.copy_(state["average_K"])
