"""Care of the codebook: k-means, restarts, moving averages; two ranks do what one does with the joined batch."""

import numpy as np
import pytest
import torch

from megatron_ext.config import InputError
from megatron_ext.vision.quantizer import VectorQuantizer, nearest_codes
from tokenizer_train.vision.codebook import (
    ALONE,
    CodebookKeeper,
    SharedRows,
    kmeans,
    move_to_averages,
    restart_codes,
)
from tokenizer_train.vision.config import CodebookConfig, LossConfig, VisionTokenizerTrainingConfig, VisionTrainConfig

NUM_CODES, SIZE = 24, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(step: int, part: int, rows: int = 90) -> torch.Tensor:
    """Latents of a micro-batch of a step: six clouds, of which the training sees two, so that codes die."""
    made, clouds = generator(100 * step + part), 2 if step else 6
    return torch.randn(rows, SIZE, generator=made) * 0.2 + torch.randint(clouds, (rows, 1), generator=made) * 3.0


def shares(rows_ND: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """The rank's piece of a micro-batch; the pieces are of different sizes."""
    return rows_ND if count == 1 else (rows_ND[:40], rows_ND[40:])[rank]


def look_after(peers, update: str, stop_after: int = 6) -> list[dict]:
    """K-means, then steps with restarts, half way with a keeper and codes that were saved: all that came of it."""
    config = CodebookConfig(update=update, ema_decay=0.9, kmeans_iterations=4, restart_interval=2, restart_until_step=4)
    torch.manual_seed(3)
    quantizer = VectorQuantizer(NUM_CODES, SIZE)
    keeper = CodebookKeeper(config, quantizer, 7, peers)
    optimizer = torch.optim.AdamW([quantizer.embedding.weight])
    keeper.place([shares(latents(0, part), peers.rank, peers.count) for part in range(3)])
    found = [{"codes": quantizer.embedding.weight.detach().clone()}]
    for step in range(1, stop_after + 1):
        if step == 4:
            state = {name: value.clone() for name, value in keeper.state_dict().items()}
            keeper = CodebookKeeper(config, quantizer, 7, peers)
            keeper.load_state_dict(state)
        parts = [shares(latents(step, part), peers.rank, peers.count) for part in range(2)]
        codes = [nearest_codes(part, quantizer.embedding.weight.detach()) for part in parts]
        line = keeper.note(step, codes, parts, optimizer)
        found.append({"codes": quantizer.embedding.weight.detach().clone(), **keeper.state_dict(), "line": line})
        found[-1] |= {name: value.clone() for name, value in keeper.state_dict().items()}
    return found


def look_after_on_a_rank(updates: list[str]) -> list[list[dict]]:
    from megatron_ext.config.parallel import ParallelConfig
    from megatron_ext.config.runtime import RuntimeConfig
    from megatron_ext.runtime import Topology
    from tokenizer_train.vision.parallel import Replicas

    with Topology.start(RuntimeConfig(device="cpu"), ParallelConfig()) as topology:
        return [look_after(Replicas(topology), update) for update in updates]


def test_two_ranks_do_what_one_does(ranks):
    updates = ["gradient", "ema"]
    found_by_rank = ranks.run(look_after_on_a_rank, 2, updates)
    for index, update in enumerate(updates):
        alone = look_after(ALONE, update)
        assert any("codes_restarted" in found.get("line", {}) for found in alone)
        moved = [not torch.equal(alone[i]["codes"], alone[i + 1]["codes"]) for i in range(len(alone) - 1)]
        assert moved == ([True] * 6 if update == "ema" else [False, True, False, moved[3], False, False])
        for rank in found_by_rank:
            for mine, joined in zip(rank[index], alone, strict=True):
                assert mine.get("line") == joined.get("line")
                for name in set(joined) - {"line"}:
                    assert torch.equal(mine[name], joined[name]), (update, name)


def test_resumed_keeper_goes_on():
    """`look_after` takes up saved state before step 4; without it the counts and averages would differ."""
    config = CodebookConfig(update="ema", restart_interval=3, restart_until_step=6)
    quantizer = VectorQuantizer(NUM_CODES, SIZE)
    keeper = CodebookKeeper(config, quantizer, 7)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    part = latents(1, 0)
    keeper.note(1, [nearest_codes(part, quantizer.embedding.weight)], [part], optimizer)
    fresh = CodebookKeeper(config, quantizer, 7)
    assert not fresh.counts_K.any() and not fresh.average_K.any()
    fresh.load_state_dict(keeper.state_dict())
    assert torch.equal(fresh.counts_K, keeper.counts_K) and torch.equal(fresh.average_K, keeper.average_K)


def test_moving_averages_are_those_of_the_paper():
    weight, mass = torch.randn(NUM_CODES, SIZE, generator=generator(1)), torch.rand(NUM_CODES, generator=generator(2))
    sums = (weight * mass[:, None]).double().numpy()
    masses, decay = mass.double().numpy(), 0.9
    for step in range(5):
        rows = latents(step, 0)
        codes = nearest_codes(rows, weight)
        sizes, added = SharedRows([rows]).sums(codes, NUM_CODES)
        np.testing.assert_allclose(added[codes[0]], rows[codes == codes[0]].double().sum(0), rtol=0, atol=1e-6)
        move_to_averages(weight, mass, sizes, added, decay)
        mass = mass.double().lerp(sizes.double(), 1 - decay)
        sums = decay * sums + (1 - decay) * added.numpy()
        masses = decay * masses + (1 - decay) * sizes.numpy()
        # Measured 4e-7: the codes are rounded to float32 at every step.
        np.testing.assert_allclose(weight.numpy(), sums / masses[:, None], rtol=0, atol=3e-6)


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0], [10, 10]])
    vectors = (centres[:, None] + torch.randn(2, 50, 2, generator=generator()) * 0.1).flatten(0, 1)
    found = kmeans(SharedRows([vectors]), 2, 5, generator(3))
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert torch.equal(found, kmeans(SharedRows(vectors.split(7)), 2, 5, generator(3)))


def test_kmeans_lowers_the_error_and_leaves_no_code_empty():
    rows = SharedRows([torch.randn(500, 4, generator=generator())])

    def error(codes):
        return torch.cdist(rows.own_ND, codes).min(1).values.square().mean()

    errors = [error(kmeans(rows, 32, iterations, generator(1))) for iterations in (0, 1, 15)]
    assert errors[0] > errors[1] > errors[2]
    nearest = torch.cdist(rows.own_ND, kmeans(rows, 32, 15, generator(1))).argmin(1)
    assert len(nearest.unique()) == 32
    few = SharedRows([rows.own_ND[:3]])
    assert kmeans(few, 8, 3, generator()).shape == (8, 4), "fewer vectors than codes"


def test_restart_moves_only_dead_codes_and_their_moments():
    weight = torch.nn.Parameter(torch.randn(6, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    before = weight.detach().clone()
    dead = torch.tensor([False, True, False, False, True, False])
    rows = torch.randn(10, 2) + 100
    restart_codes(weight, dead, SharedRows([rows]), optimizer, generator())
    assert torch.equal(weight[~dead], before[~dead])
    assert all((row == rows).all(1).any() for row in weight[dead])
    moment = optimizer.state[weight]["exp_avg"]
    assert (moment[dead] == 0).all() and (moment[~dead] != 0).all()


def test_a_restart_has_seen_a_whole_interval():
    """However long the training without codes was: k-means' codes are not moved one step after they were placed."""
    config = CodebookConfig(start_step=9, restart_interval=10, restart_until_step=100)
    quantizer = VectorQuantizer(NUM_CODES, SIZE)
    keeper, optimizer = CodebookKeeper(config, quantizer, 7), torch.optim.AdamW([quantizer.embedding.weight])
    rows = latents(1, 0)
    codes = [torch.zeros(len(rows), dtype=torch.int64)]
    restarted = [step for step in range(10, 31) if "codes_restarted" in keeper.note(step, codes, [rows], optimizer)]
    assert restarted == [19, 29]


def test_diverged_latents_are_refused():
    with pytest.raises(InputError, match="diverged"):
        SharedRows([torch.full((4, 2), 1e20)]).sums(torch.zeros(4, dtype=torch.long), 2)
    with pytest.raises(InputError, match="diverged"):
        SharedRows([torch.full((4, 2), float("nan"))]).sums(torch.zeros(4, dtype=torch.long), 2)


def test_settings_that_cannot_act_are_refused(tmp_path):
    from megatron_ext.config.observe import ObserveConfig
    from megatron_ext.vision import VisionTokenizerConfig
    from tokenizer_train.vision.config import MediaConfig

    def configure(quantizer="nearest", loss=None, batches=1, **codebook):
        return VisionTokenizerTrainingConfig(
            media=MediaConfig(inputs=["somewhere"]),
            observe=ObserveConfig(run_dir=str(tmp_path)),
            model=VisionTokenizerConfig(quantizer=quantizer),
            loss=loss or LossConfig(),
            codebook=CodebookConfig(**codebook),
            train=VisionTrainConfig(accumulation_steps=batches),
        )

    configure("ibq", LossConfig(index_propagation=1, entropy=0.1), kmeans_batches=0)
    configure(update="ema", loss=LossConfig(codebook=0))
    for match, arguments in {
        "codebook.kmeans_batches = 50": dict(quantizer="ibq"),
        "codebook.update = 'ema'": dict(quantizer="ibq", kmeans_batches=0, update="ema"),
        "codebook.restart_until_step = 9": dict(quantizer="ibq", kmeans_batches=0, restart_until_step=9),
        "loss.entropy = 0.1 with train.accumulation_steps = 2": dict(
            quantizer="ibq", kmeans_batches=0, loss=LossConfig(entropy=0.1), batches=2
        ),
        "loss.entropy = 0.1: acts": dict(loss=LossConfig(entropy=0.1)),
        "loss.codebook = 1.0": dict(update="ema"),
        "codebook.ema_decay": dict(ema_decay=1.0),
    }.items():
        with pytest.raises(InputError, match=match):
            configure(**arguments)
