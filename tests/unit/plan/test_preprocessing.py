"""The plan of a corpus, against sums done by hand and against what the programs write."""

import io
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.config import InputError
from megatron_ext.plan.preprocessing import PlanConfig, make_plan
from tests.unit.data.samples import CODEBOOK_SIZE, train_text_tokenizer
from tools import preprocess_data

RATES = {
    "filter_pictures_per_second": 10.0,
    "cluster_hashes_per_second": 1_000_000.0,
    "divide_samples_per_second": 10_000.0,
    "tokenize_pictures_per_second": 50.0,
    "ids_per_second": 4_000_000.0,
    "text_megabytes_per_second": 20.0,
    "merge_megabytes_per_second": 400.0,
}


def test_a_billion_pictures_by_hand():
    plan = make_plan(PlanConfig(kept_share=0.5, text_gigabytes=1000, **RATES))
    stages = {stage.name: stage for stage in plan.stages}
    assert list(stages) == [
        "curate pictures", "tokenize pictures", "cluster duplicates", "divide media", "documents of media",
        "documents of text", "merge",
    ]  # fmt: skip
    # BOS, 60 ids of caption, SOV, 64*64 in five ids, SOT, 64 rows of 65, EOF, EOV, EOS
    ids = 1e9 * (1 + 60 + 1 + 5 + 1 + 64 * 65 + 1 + 1 + 1)
    text_ids = 1e12 / 4 + 2 * 1e12 / 4000
    assert plan.counts == {"tars": 100_000, "documents": 1_250_000_000, "ids": ids + text_ids}
    curate, tokenize = stages["curate pictures"], stages["tokenize pictures"]
    assert curate.device_hours == pytest.approx(2e9 / 10 / 3600)  # 55,556 core-hours
    assert curate.array_size == 1000 and curate.task_hours == pytest.approx(55_555.6 / 8 / 1000, rel=1e-4)
    assert tokenize.device_hours == pytest.approx(5555.6, rel=1e-4) and tokenize.array_size == 1000
    assert tokenize.hours == pytest.approx(8 * 5.5556, rel=1e-4)  # 1,000 tasks, 128 at once
    cluster, divide = stages["cluster duplicates"], stages["divide media"]
    assert cluster.amount == 2e9 and cluster.array_size == 1  # tables hold the raw pictures; one core, once
    assert cluster.hours == cluster.device_hours == pytest.approx(2e9 / 1e6 / 3600)
    assert divide.device_hours == pytest.approx(1e9 / 1e4 / 3600) and divide.array_size == 1
    assert divide.hours == pytest.approx(1e9 / 1e4 / 3600 / 8)  # on the 8 cores of one task
    assert stages["documents of media"].device_hours == pytest.approx(ids / 4e6 / 3600)
    assert stages["documents of text"].array_size == 1
    assert stages["documents of text"].hours == pytest.approx(1.736, rel=1e-3)
    assert stages["merge"].hours == pytest.approx((ids + text_ids) * 4 / 400e6 / 3600)
    assert plan.gigabytes["raw pictures"] == pytest.approx(300_000)
    assert plan.gigabytes["codes"] == pytest.approx(1e9 * (512 + 17 * 512 + 512 + 512) / 1e9)


def test_what_there_is_none_of_is_not_planned():
    plan = make_plan(
        PlanConfig(pictures=0, text_gigabytes=4, text_megabytes_per_second=20, merge_megabytes_per_second=0)
    )
    assert [stage.name for stage in plan.stages] == ["documents of text"]
    without = {**RATES, "cluster_hashes_per_second": 0.0, "divide_samples_per_second": 0.0}
    names = [stage.name for stage in make_plan(PlanConfig(**without)).stages]
    assert names == ["curate pictures", "tokenize pictures", "documents of media", "merge"]
    with pytest.raises(InputError, match="cluster_hashes_per_second is not given: measure it"):
        make_plan(PlanConfig(**{**RATES, "cluster_hashes_per_second": None}))
    with pytest.raises(InputError, match="tokenize_clips_per_second is not given: measure it"):
        make_plan(PlanConfig(clips=5, **RATES))
    with pytest.raises(InputError, match="task_hours 0"):
        PlanConfig(task_hours=0)
    with pytest.raises(InputError, match="ids_per_second -1.0"):
        make_plan(PlanConfig(**{**RATES, "ids_per_second": -1.0}))


def test_the_program_prints_it(tmp_path, capsys):
    (tmp_path / "rates.json").write_text(json.dumps({**RATES, "other": 3}))
    given = ["--plan", "--rates", f'["{tmp_path}/rates.json"]', "--tokenize_pictures_per_second", "100"]
    preprocess_data.main(given)
    printed = capsys.readouterr().out
    assert "tokenize pictures" in printed and "TB" in printed and "2,778 GPU" in printed
    preprocess_data.main([*given, "--json", "true"])
    config = PlanConfig(**{**RATES, "tokenize_pictures_per_second": 100.0})
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(make_plan(config))))
    with pytest.raises(InputError, match="rates: cannot read .*none.json"):
        preprocess_data.main(["--plan", "--rates", f'["{tmp_path}/none.json"]'])


def write_codes(folder: Path, keys: list[str], caption: str) -> None:
    """Pictures of 64 x 64 codes in a tar without times and owners, as tokenize_vision.py writes it."""
    codes = io.BytesIO()
    np.save(codes, np.zeros((64, 64), np.uint16))
    folder.mkdir()
    with tarfile.open(folder / "codes.tar", "w") as tar:
        for key in keys:
            facts = {"key": key, "kind": "image", "captions": [caption], "source": key, "source_sha256": "0" * 64}
            for suffix, content in (("codes.npy", codes.getvalue()), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    manifest = {"format_version": 1, "vision_tokenizer": "x", "codebook_size": CODEBOOK_SIZE}
    manifest |= {"samples": {"image": len(keys)}, "shards": [{"name": "codes.tar", "sha256": "", "samples": len(keys)}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_sizes_are_those_of_the_files(tmp_path):
    """A small corpus, planned and made: codes and datasets within 2 %."""
    count, caption = 300, "0123456789" * 6  # 60 ids: each digit is one
    (tmp_path / "text.model").write_bytes(train_text_tokenizer())
    keys = [f"{n:024d}" for n in range(count)]
    write_codes(tmp_path / "codes", keys, caption)
    vocabulary = ["layout=custom", f"text_tokenizer={tmp_path}/text.model", f"codebook_size={CODEBOOK_SIZE}"]
    given = [f'--vision=["{tmp_path}/codes"]', f"--output_prefix={tmp_path}/set"]
    preprocess_data.main([*given, *(f"--vocab.{option}" for option in vocabulary)])
    plan = make_plan(PlanConfig(pictures=count, shard_size=count, key_bytes=24, **RATES))
    measured = sum(path.stat().st_size for path in (tmp_path / "codes").glob("*.tar")) / 1e9
    assert plan.gigabytes["codes"] == pytest.approx(measured, rel=0.02)
    measured = sum((tmp_path / f"set_train{suffix}").stat().st_size for suffix in (".bin", ".idx", ".spans.npz")) / 1e9
    assert plan.gigabytes["datasets"] == pytest.approx(measured, rel=0.02)
    assert plan.counts["ids"] * 4 == (tmp_path / "set_train.bin").stat().st_size and plan.counts["tars"] == 1
