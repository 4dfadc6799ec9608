"""Six kills of `make soak`, one of each way, on a run that saves in the background; and what the run says of them."""

import random
import shutil
from pathlib import Path

import pytest

from megatron_ext.checkpoint import latest_checkpoint, read_metadata
from megatron_ext.files import read_json_lines
from tests.soak import plan
from tests.soak.__main__ import Soak, carry_out
from tests.soak.job import Job, processes_of, send
from tests.soak.plan import SHORT
from tests.soak.strike import Events
from tests.soak.summary import BLOCK, DOCUMENT, LOG, read_log, table

pytestmark = pytest.mark.timeout(900)  # seven starts of two ranks, on a machine that may be busy

SEED = random.randrange(1 << 32)
"""Of the moments; in the message of every failure."""


@pytest.fixture(scope="module")
def soak(tmp_path_factory) -> Soak:
    """Carried out; as the run was after four kills in the folder `copy`."""
    made = Soak(tmp_path_factory.mktemp("soak"), len(SHORT), SEED, SHORT)
    print(f"seed {SEED}")  # pytest shows it where something fails
    assert carry_out(made, after=lambda number: number == 3 and copy(made)) == "equal", f"seed {SEED}"
    return made


def copy(soak: Soak) -> None:
    """Everything was killed: nothing writes there."""
    shutil.copytree(soak.run, soak.folder / "copy")


def metrics(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name != "timing"}
        for line in read_json_lines(run / "metrics.jsonl")
    ]


def test_a_run_that_was_killed_six_times_is_the_undisturbed_one_bit_for_bit(soak):
    """The soak's own verdict is that of compare_runs; here the lines themselves."""
    assert metrics(soak.run) == metrics(soak.undisturbed), f"seed {SEED}"
    assert [line["step"] for line in metrics(soak.run)] == list(range(1, soak.steps + 1))
    # What megatron-core says of every save when ranks hand it unlike dictionaries.
    assert "common state dict differs" not in soak.undisturbed.with_suffix(".log").read_text()
    checkpoints = soak.run / "checkpoints"
    assert (checkpoints / "latest").read_text() == f"step_{soak.steps:08d}\n"
    assert len(list(checkpoints.iterdir())) == 3, "two checkpoints and `latest`: nothing of the killed attempts is left"
    buckets = read_metadata(latest_checkpoint(checkpoints))["gradient_buckets"]
    assert len(buckets) >= 3 and sum(elements % 128 > 0 for elements in buckets[:-1]) >= 2, "padded to 128"


def test_every_kill_was_one(soak):
    records = [record for record in read_log(soak.log) if "kill" in record]
    assert [(record["target"], record["moment"]) for record in records] == list(SHORT)
    assert all(record["reached"] and record["unusable"] == [] for record in records)
    *_, everything, torchrun, terminate = records
    # How far a save comes from its rename on before the signal does.
    assert everything["state"] in ("renamed, `latest` not moved", "old one half removed", "no save in progress")
    assert torchrun["after"] == "started again at once"
    assert terminate["after"] == f"saved step {terminate['latest']} and ended"
    assert "6 kills" in table(read_log(soak.log)) and soak.next_kills() == []


def test_ranks_whose_torchrun_was_killed_save_and_stop(soak):
    """Else they would train on beside the ranks of the next start."""
    stops = [event["reason"] for event in Events(soak.run / "events.jsonl").of("stop")]
    assert stops == ["SIGTERM", "SIGTERM"], "of the lost torchrun and of the signal to all"


def test_failed_saves_are_reported_and_tried_again(soak):
    events = Events(soak.run / "events.jsonl").of("save", "save_failed")
    reasons = [event["reason"] for event in events if event["event"] == "save_failed"]
    assert "the writer process ended with SIGKILL" in reasons[0] and "No space left on device" in reasons[1]
    assert len(reasons) == 2 and events[-1]["event"] == "save"
    assert "the next due step tries again" in soak.run.with_suffix(".log").read_text()


def test_every_start_records_what_its_bits_depend_on(soak):
    found = [event["environment"] for event in Events(soak.run / "events.jsonl").of("start")]
    assert len(found) == 5 and all(environment == found[0] for environment in found)
    assert found[0].keys() == {"torch", "megatron_core", "device", "threads", "world_size", "layout"}
    assert found[0]["world_size"] == 2 and found[0]["layout"]["data_parallel_size"] == 2


def test_killed_on_one_layout_and_finished_on_another(soak):
    run = soak.folder / "copy"
    tensor = ("--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true")
    job = Job.start(run, *tensor)
    try:
        assert job.torchrun.wait(240) == 0, f"seed {SEED}\n{job.tail()}"
    finally:
        send(9, processes_of(run))
    found, undisturbed = metrics(run), metrics(soak.undisturbed)
    assert len(found) == len(undisturbed)
    for ours, theirs in zip(found, undisturbed, strict=True):
        # A window out of order would change a loss by some 1e-2.
        assert ours == pytest.approx(theirs, rel=1e-5), f"seed {SEED}"  # measured 2e-7


def test_the_documentation_shows_the_table_of_its_log():
    docs = Path(__file__).parents[2] / "docs"
    records = read_log(docs / LOG)
    assert BLOCK.search((docs / DOCUMENT).read_text(encoding="utf-8"))[0] == table(records)
    kills = [record for record in records if "kill" in record]
    assert len(kills) >= 100 and not any(record["unusable"] for record in kills)
    assert records[-1]["end"]["verdict"] == "equal"


def test_the_plan_follows_from_the_seed():
    whole = plan.plan(7, 100, 2)
    assert whole == plan.plan(7, 100, 2) != plan.plan(8, 100, 2)
    targets = {kill.target for kill in whole}
    assert targets == {
        plan.RANK, plan.MAIN_RANK, plan.ALL_RANKS, plan.WRITER, plan.EVERYTHING, plan.TORCHRUN, plan.TERMINATE,
        plan.ONE_FILE_FULL, plan.ALL_FILES_FULL,
    }  # fmt: skip
    assert {kill.moment for kill in whole} == {plan.ANY_TIME, plan.START_UP, *plan.MOMENTS}
    for before, kill in zip(whole, whole[1:], strict=False):
        assert kill.step > before.step
        if kill.moment == plan.START_UP:
            assert before.target in plan.ENDS_THE_JOB, "there is a start to kill"
