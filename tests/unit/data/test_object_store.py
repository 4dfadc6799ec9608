"""A dataset on an object store is the dataset, through boto3 and a local server that speaks S3."""

import multiprocessing
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from megatron_ext.config import InputError
from megatron_ext.config.data import DataConfig, DatasetConfig
from megatron_ext.data import PackedDataset, PackingRules, build_data
from tests.unit.data.samples import random_dataset
from tests.unit.data.test_loader import TRAIN, Place

RULES = PackingRules(seq_length=64, alignment=8)
PREFIX = "s3://datasets/stage1/train"


@pytest.fixture(scope="module")
def store():
    """A server with a bucket, and the environment that leads to it."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="datasets")
        yield client
    running.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory, vocabulary) -> Path:
    return random_dataset(tmp_path_factory.mktemp("local") / "train", vocabulary, count=30)


def upload(client, local: Path) -> None:
    for suffix in (".bin", ".idx", ".spans.npz", ".manifest.json"):
        client.upload_file(f"{local}{suffix}", "datasets", f"stage1/train{suffix}")


def test_windows_are_those_of_the_local_dataset(store, local, vocabulary, tmp_path):
    upload(store, local)
    remote = PackedDataset(PREFIX, vocabulary, RULES, str(tmp_path))
    here = PackedDataset(local, vocabulary, RULES)
    assert remote.name == PREFIX and remote.identity == here.identity and len(remote) == len(here)
    for number in range(len(here)):
        np.testing.assert_array_equal(remote[number].ids, here[number].ids)
        assert remote.keys(number) == here.keys(number)
    assert not list(tmp_path.rglob("*.bin")), "the ids stay in the store"
    config = DataConfig(train=(DatasetConfig(prefix=PREFIX),), document_alignment=8, cache_dir=str(tmp_path))
    loader = build_data(config, TRAIN, vocabulary, Place()).train
    assert loader.dataset_names == ("train",) and loader.microbatches(0)[0].tokens_BT.shape == (1, 64)


def _open(prefix, vocabulary, cache_dir, barrier, results):
    barrier.wait()
    results.put(int(PackedDataset(prefix, vocabulary, RULES, cache_dir)[0].ids.sum()))


def test_ranks_may_start_at_once(store, local, vocabulary, tmp_path):
    upload(store, local)
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(3), fork.Queue()
    arguments = (PREFIX, vocabulary, str(tmp_path), barrier, results)
    ranks = [fork.Process(target=_open, args=arguments) for _ in range(3)]
    for rank in ranks:
        rank.start()
    assert len({results.get(timeout=60) for _ in ranks}) == 1
    for rank in ranks:
        rank.join()
    assert len(list((tmp_path / "object_store").glob("*/datasets/stage1/train.idx"))) == 1


def test_a_dataset_that_was_replaced_is_copied_again(store, local, vocabulary, tmp_path):
    upload(store, local)
    first = PackedDataset(PREFIX, vocabulary, RULES, str(tmp_path))
    upload(store, random_dataset(tmp_path / "train", vocabulary, count=20, seed=9))
    second = PackedDataset(PREFIX, vocabulary, RULES, str(tmp_path))
    assert (len(first.documents), len(second.documents)) == (30, 20)
    np.testing.assert_array_equal(second[0].ids, PackedDataset(tmp_path / "train", vocabulary, RULES)[0].ids)


def test_what_is_wrong_is_named(store, local, vocabulary, tmp_path, monkeypatch):
    upload(store, local)
    with pytest.raises(InputError, match="s3://datasets/stage1/train is on an object store: set data.cache_dir"):
        PackedDataset(PREFIX, vocabulary, RULES)
    with pytest.raises(InputError, match=r"cannot read s3://datasets/none.manifest.json \(.*NoSuchKey.*\): check the"):
        PackedDataset("s3://datasets/none", vocabulary, RULES, str(tmp_path))
    store.put_object(Bucket="datasets", Key="stage1/train.bin", Body=b"short")
    with pytest.raises(InputError, match="s3://datasets/stage1/train.bin has 5 bytes, its manifest says"):
        PackedDataset(PREFIX, vocabulary, RULES, str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(InputError, match="cannot read s3://.*Could not connect.*AWS_ENDPOINT_URL") as refusal:
        PackedDataset(PREFIX, vocabulary, RULES, str(tmp_path))
    assert "\n" not in str(refusal.value)
