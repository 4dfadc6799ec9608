"""The measurements of a preflight on real ranks."""

from dataclasses import replace
from pathlib import Path

from megatron_ext.config.parallel import ParallelConfig
from megatron_ext.config.runtime import RuntimeConfig
from megatron_ext.job.preflight import Bounds, judge
from tests.support.distributed import use_next_store

BOUNDS = Bounds(slow_share=0.01, min_free_share=0.9, min_disk_mbs=0.1, max_clock_skew_s=1.0)
"""For a machine that many share; what is slow is judged in tests/unit/job."""


def look(run_dir: str):
    from megatron_ext.config.observe import ObserveConfig
    from megatron_ext.config.train import TrainConfig
    from megatron_ext.runtime import Topology
    from tools.preflight import PreflightConfig, measure_own, measure_together

    config = PreflightConfig(
        train=TrainConfig(train_steps=1),
        observe=ObserveConfig(run_dir=run_dir),
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        disk_mib=2,
    )
    with Topology.start(RuntimeConfig(device="cpu", num_threads=1), config.parallel) as topology:
        found = measure_together(config, topology, measure_own(config, topology))
    use_next_store()
    return found


def test_ranks_of_one_machine_are_alike_and_all_axes_are_measured(ranks, tmp_path):
    found = ranks.run(look, 4, str(tmp_path / "run"))
    assert judge(found, BOUNDS) == []
    assert [one.peers for one in found[:2]] == [
        {"tensor": (0, 1), "data": (0, 2)},
        {"tensor": (0, 1), "data": (1, 3)},
    ]
    assert all(speed > 0 for one in found for speed in (*one.bandwidths.values(), one.tflops))
    assert {"torch", "megatron-core", "code", "configuration", "product of two matrices"} <= found[0].facts.keys()
    assert found[0].write_mbs > 0 and found[0].read_mbs > 0
    assert not list(Path(tmp_path / "run").iterdir()), "the file it measured with is gone"
    late = [replace(one, clock_s=one.clock_s + 5 * (one.rank == 3)) for one in found]
    [fault] = judge(late, BOUNDS)
    assert "(rank 3): its clock is +5.0 s off" in fault
