"""Which nodes a preflight accuses."""

from dataclasses import replace

import pytest

from megatron_ext.job.preflight import Bounds, Finding, judge

BOUNDS = Bounds(slow_share=0.5, min_free_share=0.9, min_disk_mbs=20, max_clock_skew_s=1)
NODES, RANKS = 4, 2


def finding(rank: int) -> Finding:
    """Of a rank in a job of 4 nodes x 2 ranks: tensor pairs within nodes, data groups across them."""
    host, local = divmod(rank, RANKS)
    pair = tuple(range(host * RANKS, host * RANKS + RANKS))
    return Finding(
        rank=rank,
        host=f"n{host}",
        facts={"torch": "2.13.0", "product of two matrices": "abc"},
        free_share=0.98,
        tflops=700 + rank,
        clock_s=1000 + 0.001 * rank,
        write_mbs=None if local else 300 + rank,
        read_mbs=None if local else 900,
        bandwidths={"tensor": 400.0, "data": 45.0 - rank % 2},
        peers={"tensor": pair, "data": tuple(range(local, NODES * RANKS, RANKS))},
    )


GOOD = [finding(rank) for rank in range(NODES * RANKS)]


def accuse(*changed: Finding) -> list[str]:
    by_rank = {found.rank: found for found in changed}
    return judge([by_rank.get(found.rank, found) for found in GOOD], BOUNDS)


def test_good_nodes():
    assert accuse() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": {"torch": "2.11.0"}}, "n2 (rank 5): torch is 2.11.0, elsewhere 2.13.0"),
        ({"facts": {"product of two matrices": "xyz"}}, "n2 (rank 5): product of two matrices is xyz, elsewhere abc"),
        ({"tflops": 200.0}, "n2 (rank 5): matrix products at 200 TFLOP/s, the median is 702"),
        ({"free_share": 0.5}, "n2 (rank 5): 50% of the memory is free, less than 90%: another process holds it"),
        ({"read_mbs": 3.0}, "n2 (rank 5): reads the run folder at 3 MB/s, less than 20"),
        ({"clock_s": 1007.0}, "n2 (rank 5): its clock is +7.0 s off"),
    ],
)
def test_one_bad_rank(changes, message):
    assert accuse(replace(GOOD[5], **changes)) == [message]


def test_a_slow_link_within_a_node():
    slow = [replace(GOOD[rank], bandwidths=GOOD[rank].bandwidths | {"tensor": 20.0}) for rank in (2, 3)]
    assert accuse(*slow) == ["n1 (ranks 2, 3): all-reduce along the tensor axis at 20 GB/s, the median is 400"]


def test_the_node_that_slow_groups_have_in_common():
    groups = {rank: {"context": ranks} for ranks in ((0, 1), (1, 2), (2, 3), (3, 4)) for rank in ranks[:1]}
    found = [
        replace(GOOD[rank], host=f"n{rank}", bandwidths={"context": 5.0 if rank in (1, 2) else 50.0}, peers=peers)
        for rank, peers in groups.items()
    ]
    # two groups: (1, 2) and (2, 3)
    faults = judge([*found, replace(GOOD[4], host="n4", bandwidths={}, peers={})], BOUNDS)
    assert len(faults) == 2 and all("n2 is in all slow groups" in fault for fault in faults)
