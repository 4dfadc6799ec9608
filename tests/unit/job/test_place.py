"""What is refused before a job waits in the queue."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_ext.checkpoint import CheckpointStore
from megatron_ext.config import InputError, load, to_yaml
from megatron_ext.config.run import RunConfig
from megatron_ext.job import Request, check_place
from megatron_ext.plan import DecoderShape
from megatron_ext.vocab import Vocabulary
from tests.support.small_run import write_small_run

TWO = Request(nodes=1, gpus_per_node=2, ranks_per_node=2)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write_small_run(folder)
    return folder


def configure(workplace: Path, run: Path, *arguments: str) -> RunConfig:
    return load(RunConfig, ["--config", f"{workplace}/config.yaml", "--observe.run_dir", str(run), *arguments])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", (1, 0, 1)),
        ("-N 16 --gpus-per-node 8", (16, 8, 8)),
        ("-N16 --gpus-per-node=h100:8 --partition x --exclusive", (16, 8, 8)),
        ("--nodes=4 --ntasks-per-node 2", (4, 0, 2)),
        ("--nodes 2 --nodes 3", (3, 0, 1)),
    ],
)
def test_what_is_asked_of_the_queue(options, expected, monkeypatch):
    monkeypatch.delenv("SBATCH_GPUS_PER_NODE", raising=False)
    assert dataclasses.astuple(Request.of(options.split())) == expected


def test_the_site_s_gpus_and_a_range_of_nodes(monkeypatch):
    monkeypatch.setenv("SBATCH_GPUS_PER_NODE", "4")
    assert Request.of(["-N", "2"]).world_size == 8
    with pytest.raises(InputError, match="--nodes 2-4: give one whole number"):
        Request.of(["-N", "2-4"])


def test_a_fit_job_passes_and_leaves_nothing(workplace, tmp_path):
    check_place(configure(workplace, tmp_path / "run"), TWO)
    assert not list(tmp_path.iterdir())


def test_datasets_on_an_object_store_and_without_sidecar_are_left_to_the_run(workplace, tmp_path):
    shutil.copytree(workplace, tmp_path / "data")
    (tmp_path / "data" / "train.spans.npz").unlink()
    prefixes = f'[{{"prefix": "s3://bucket/train"}}, {{"prefix": "{tmp_path}/data/train"}}]'
    check_place(configure(workplace, tmp_path / "run", "--data.train", prefixes, "--data.cache_dir", "cache"), TWO)


@pytest.mark.parametrize(
    ("arguments", "request_", "names"),
    [
        (["--train.micro_batch_size", "4"], TWO, ["global_batch_size 4", "data-parallel size 2"]),
        ([], Request(nodes=1, gpus_per_node=1, ranks_per_node=2), ["--ntasks-per-node 2", "--gpus-per-node 1"]),
        (["--runtime.device", "cuda"], Request(nodes=1, gpus_per_node=0, ranks_per_node=1), ["asks for no GPU"]),
        (["--data.train", '[{"prefix":"none"}]'], TWO, ["none.manifest.json is missing"]),
        (["--checkpoint.init_from", "no/such"], TWO, ["checkpoint.init_from 'no/such'"]),
        (["--vocab.text_tokenizer", "no.model"], TWO, ["no.model"]),
        (["--observe.run_dir", "{w}/text.model/x"], TWO, ["observe.run_dir", "text.model"]),
    ],
)
def test_what_cannot_start(workplace, tmp_path, arguments, request_, names):
    arguments = [argument.replace("{w}", str(workplace)) for argument in arguments]
    with pytest.raises(InputError) as error:
        check_place(configure(workplace, tmp_path / "run", *arguments), request_)
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_a_checkpoint_in_precision_auto_is_reckoned_at_its_largest(workplace, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))

    def refusal(precision: str, request_: Request) -> str:
        with pytest.raises(InputError) as error:
            check_place(configure(workplace, tmp_path / "run", "--runtime.precision", precision), request_)
        return str(error.value)

    on_cpu = Request(nodes=1, gpus_per_node=0, ranks_per_node=1)
    assert refusal("auto", on_cpu) == refusal("fp32", on_cpu) != refusal("bf16", on_cpu)
    assert refusal("auto", TWO) == refusal("bf16", TWO)


def test_a_full_disk(workplace, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(InputError, match="100 free: free some"):
        check_place(configure(workplace, tmp_path / "run"), TWO)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--train.seed", "5"], ["train.seed 1234", "this configuration has 5"]),
        (["--train.seq_length", "128"], ["train.seq_length 64", "128"]),
        (["--model.hidden_size", "32"], ["trained with model"]),
    ],
)
def test_a_run_folder_of_another_configuration(workplace, tmp_path, arguments, names):
    config = configure(workplace, tmp_path / "run")
    identities = {
        "vocabulary": Vocabulary.load(config.vocab).identity,
        "model": DecoderShape.of(config.model).identity,
    }
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    store.write(3, lambda folder: (folder / "config.yaml").write_text(to_yaml(config)), identities)
    check_place(configure(workplace, tmp_path / "run", "--optim.lr", "1", "--train.train_steps", "9"), TWO)
    longer = ("--data.allow_change", "true", "--train.seq_length", "128")
    check_place(configure(workplace, tmp_path / "run", *longer), TWO)
    arguments = [argument.replace("{w}", str(workplace)) for argument in arguments]
    with pytest.raises(InputError) as error:
        check_place(configure(workplace, tmp_path / "run", *arguments), TWO)
    assert all(name in str(error.value) for name in [*names, "another observe.run_dir"])
