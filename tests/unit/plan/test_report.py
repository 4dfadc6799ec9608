"""`pretrain_emu3.py --dry_run`: what it prints, that it is quick and needs no torch."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain_emu3
from megatron_ext.config import InputError

ROOT = Path(__file__).parents[3]
STAGE1 = ["--config", str(ROOT / "examples" / "emu3_8b_stage1.yaml")]


def printed(capsys, *arguments: str) -> str:
    """The plan, without line breaks."""
    pretrain_emu3.main([*STAGE1, *arguments])
    return " ".join(capsys.readouterr().out.split())


def test_quick_and_without_torch():
    """In a process of its own, as a user starts it. Processor time: the wall clock is the machine's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = (
        "import sys, pretrain_emu3; pretrain_emu3.main(sys.argv[1:]); "
        "assert not {'torch', 'megatron.core', 'transformers'} & sys.modules.keys()"
    )
    arguments = [*STAGE1, "--dry_run", "--suggest", "--world_size", "1024"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "8,492,011,520" in done.stdout
    # Measured: 0.6 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_refusal_needs_no_torch_either():
    script = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'pretrain_emu3.py'; "
        "import pretrain_emu3; pretrain_emu3.cli()"
    )
    arguments = [*STAGE1, "--dry_run", "--world_size", "3", "--parallel.tensor_model_parallel_size", "2"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_figures(capsys):
    text = printed(capsys, "--dry_run", "--world_size", "128", "--tokens", "1e12", "--mfu", "0.4")
    assert "8,492,011,520" in text and "50.4 GF a token" in text
    assert "tensor 1 x context 2 x data 64" in text
    assert "1,024 windows of 5,120 = 5,242,880 tokens, 16 microbatches a rank" in text
    assert "190,735 steps" in text  # 1e12 / 5,242,880, rounded up
    # 50.44e9 x 1e12 FLOPs at 128 x 0.4 x 989.4e12 a second are 995,700 s
    assert "11.5 days" in text
    sizes = {kind: float(size) for kind, size in re.findall(r"\b(weights|gradients|optimizer) ([\d.]+)", text)}
    padded = 8_492_011_520 + 2 * (184_704 - 184_622) * 4096
    for kind, number in {"weights": 2, "gradients": 4, "optimizer": 12 / 128}.items():
        assert sizes[kind] == pytest.approx(number * padded / 2**30, abs=0.06)


def test_stage_2_has_the_flops_of_its_length(capsys):
    assert "149.5 GF a token" in printed(capsys, "--train.seq_length", "131072", "--dry_run", "--world_size", "128",
                                          "--memory_gib", "1000")  # fmt: skip


def test_every_broken_rule_is_printed(capsys):
    changes = ["--parallel.tensor_model_parallel_size", "3", "--data.train", "[]", "--train.global_batch_size", "1000"]
    with pytest.raises(InputError, match="broken rules: 6"):
        printed(capsys, *changes, "--dry_run", "--world_size", "128")
    text = " ".join(capsys.readouterr().out.split())
    for named in (
        "parallel.tensor_model_parallel_size 3 x parallel.context_parallel_size 2 does not divide",
        "train.global_batch_size 1000 is not a multiple",
        "data.train is empty",
        "model.num_attention_heads 32 is not a multiple of parallel.tensor_model_parallel_size 3",
        "model.num_query_groups 8 is not a multiple",
        "model.ffn_hidden_size 14336 is not a multiple",
    ):
        assert f"broken {named}" in text


def test_precision_and_shape_are_checked_for_gpus(capsys):
    for changes, named in (
        (["--runtime.precision", "fp32"], "runtime.precision is fp32 on a GPU"),
        (["--runtime.precision", "fp8", "--model.ffn_hidden_size", "14344"], "is 14344, runtime.fp8_recipe tensorwise"),
    ):
        with pytest.raises(InputError, match="broken rules: 1"):
            printed(capsys, *changes, "--dry_run", "--world_size", "128")
        assert named in " ".join(capsys.readouterr().out.split())


def test_auto_is_planned_as_what_it_can_become(capsys):
    auto = ["--runtime.precision", "auto", "--dry_run", "--world_size", "128"]
    assert "weights 15.8 bf16 (auto on a GPU) gradients" in printed(capsys, *auto)
    on_cpu = printed(capsys, *auto, "--runtime.device", "cpu")
    assert "fp32 (auto: bf16 where the CPU multiplies it, else fp32; this one takes more)" in on_cpu
    cpu = ["--dry_run", "--world_size", "128", "--runtime.device", "cpu", "--runtime.precision"]
    peaks = {
        name: float(re.search(r"peak ([\d.]+)", printed(capsys, *cpu, name))[1]) for name in ("auto", "fp32", "bf16")
    }
    assert peaks["auto"] == peaks["fp32"] > peaks["bf16"]
    layouts = printed(capsys, "--suggest", "--world_size", "128").partition("Layouts")[2]
    assert printed(capsys, *auto, "--suggest").partition("Layouts")[2] == layouts != ""


def test_too_large_for_the_gpu(capsys):
    assert "does not fit into 43.2 GiB, 90% of a GPU's 48" in printed(
        capsys, "--dry_run", "--world_size", "128", "--memory_gib", "48"
    )


def test_nothing_fits(capsys):
    text = printed(capsys, "--suggest", "--world_size", "128", "--memory_gib", "4")
    assert "No layout of 128 ranks fits into 3.6 GiB, 90% of a GPU's 4: use more ranks" in text


def test_suggestion_can_be_copied(capsys):
    text = printed(capsys, "--suggest", "--world_size", "128", "--memory_gib", "48")
    arguments = re.search(r"The first one: (--.*)", text)[1].split()
    assert "fits into 43.2 GiB" in printed(capsys, *arguments, "--dry_run", "--world_size", "128", "--memory_gib", "48")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.preset", "emu4"], "emu4"),
        (["--model.num_query_groups", "5"], "model.num_query_groups 5"),
        (["--vocab.codebook_size", "5"], "vocab.codebook_size 5: it is fixed by vocab.layout emu3"),
        (["--parallel.context_parallel_size", "0"], "parallel.context_parallel_size 0"),
        (["--model.presett", "tiny"], "model.preset"),
        (["--runtime.device", "cpu", "--suggest"], "--suggest ranks layouts of GPUs"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, named):
    with pytest.raises(InputError) as error:
        pretrain_emu3.main([*STAGE1, *arguments, "--dry_run", "--world_size", "8"])
    assert named in str(error.value) and "\n" not in str(error.value)
