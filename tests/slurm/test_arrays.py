"""slurm/preprocess_array.sbatch under a real Slurm: pictures to codes by tasks of an array, of which not all live."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch

from megatron_ext.vision import MoVQGAN, VisionTokenizerConfig, save_vision_tokenizer
from tests.slurm.cluster import Cluster, environment_of, kill_all, wait_until
from tests.slurm.runs import ROOT, send
from tests.support.chat_server import MODEL, chat_server
from tests.unit.data.samples import train_text_tokenizer
from tools import caption, curate_images, curate_videos, preprocess_data

pytestmark = pytest.mark.timeout(600)

TASKS = 3
TOKENIZER = VisionTokenizerConfig(codebook_size=64, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=())


class Place:
    """A folder with tokenizers, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        """Write the tokenizers."""
        self.cluster = cluster
        self.folder = folder
        self.caption_server = ""
        torch.manual_seed(0)
        save_vision_tokenizer(MoVQGAN(TOKENIZER).eval(), folder / "tokenizer")
        (folder / "text.model").write_bytes(train_text_tokenizer())
        self.environment = cluster.environment | {
            "PYTHON": sys.executable,
            "SBATCH_GPUS_PER_NODE": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def submit(self, program: str, *queue: str) -> tuple[int, str, str]:
        """Exit code, output and errors of `bash slurm/preprocess_array.sbatch`; a task to a node, into `array`."""
        options = ("--cpus-per-task", "4", "--output", str(self.folder / "%j.log"), *queue, program)
        return result(self._start("bash", "slurm/preprocess_array.sbatch", *options, *self.arguments(program, "array")))

    def alone(self, program: str) -> subprocess.Popen:
        """One process without Slurm, into `alone`."""
        return self._start(sys.executable, f"tools/{program}.py", *self.arguments(program, "alone"))

    def _start(self, *command: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def arguments(self, program: str, output: str) -> list[str]:
        """A shard of codes is two pictures: a task makes several, so that it can be met between them."""
        folder, into = self.folder, self.folder / program / output
        options = {
            "tokenize_vision": {
                "inputs": f"[{ROOT}/examples/media/images]", "tokenizer": folder / "tokenizer", "shard_size": 2,
                "output": into, "resize.min_pixels": 1024, "resize.max_pixels": 25600,
                "decode_workers": 1, "device": "cpu",
            },
            "curate_images": {"inputs": f"[{ROOT}/examples/media/images]", "piece_size": 8, "output": into},
            "curate_videos": {
                "inputs": f"[{ROOT}/examples/media/clips]", "part_size": 1, "output": into, "workers": 1,
                "encoding.preset": "ultrafast", "filters.min_shorter_edge": 64, "filters.min_clip_s": 0.5,
                "filters.max_text": "null",
            },
            "caption": {
                "inputs": f"[{ROOT}/examples/media/images]", "output": into, "server.base_url": self.caption_server,
                "server.model": MODEL,
            },
            "preprocess_data": {
                "text": f"[{ROOT}/examples/media/text/*.txt]", "output_prefix": into / "text", "vocab.layout": "custom",
                "vocab.text_tokenizer": folder / "text.model", "vocab.codebook_size": TOKENIZER.codebook_size,
            },
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in options[program].items()]

    def log(self, job: str) -> str:
        """What a job has printed."""
        return (self.folder / f"{self.cluster.job(job)['JobId']}.log").read_text()

    def programs_of(self, task: int) -> list[psutil.Process]:
        """The processes that tokenize for a task of an array."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if f"--output={self.folder}/tokenize_vision/array" in (process.info["cmdline"] or [])
            and process.info["cmdline"][0] == sys.executable
            and environment_of(process).get("SLURM_ARRAY_TASK_ID") == str(task)
        ]

    def hold(self, tasks: Iterable[int]) -> None:
        """Let tasks stand still in the middle of their work, each when it has finished a shard of codes."""
        codes = self.folder / "tokenize_vision" / "array"
        tasks = set(tasks)

        def all_held() -> bool:
            for task in list(tasks):
                # Tasks take the shards of codes in turn.
                if (codes / "finished" / f"codes-00000-{task:05d}.json").exists():
                    send(signal.SIGSTOP, self.programs_of(task))
                    tasks.remove(task)
            return not tasks

        wait_until(all_held, f"tasks {tasks} finish no shard", 120)


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory) -> Place:
    return Place(cluster, tmp_path_factory.mktemp("arrays"))


def result(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def numbers(submitted: tuple[int, str, str]) -> tuple[str, str]:
    """(array, the job that merges it)."""
    assert submitted[0] == 0, submitted
    return re.search(r"array job (\d+), merged by job (\d+)", submitted[1]).groups()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bad_input_gets_one_line_before_the_queue(place):
    for queue, line in (((), "--array '': give one range"), (("--array=1,5",), "--array '1,5': give one range")):
        code, _, errors = place.submit("tokenize_vision", *queue)
        assert code == 2 and errors.startswith("error: ") and line in errors and errors.count("\n") == 1
    assert place.cluster.run("squeue", "--noheader") == ""


def test_the_tasks_make_what_one_process_makes(place):
    """Of three tasks two are killed, of which one is cancelled when it waits again, the third loses its node: two go
    on, the merge names what the other has left, and what is submitted then makes only that."""
    cluster, codes = place.cluster, place.folder / "tokenize_vision"
    array, merge = numbers(place.submit("tokenize_vision", "--array", f"0-{TASKS - 1}"))
    place.hold([0, 1])
    on = {cluster.job(f"{array}_{task}")["NodeList"]: task for task in (0, 1)}
    assert len(list((codes / "array").glob("*.tar"))) < 9, "both tasks have ended"

    kill_all(place.programs_of(on["n1"]))
    last, lost = f"{array}_{TASKS - 1}", f"{array}_{on['n2']}"
    wait_until(lambda: place.programs_of(TASKS - 1), "the last task does not start", 120)
    assert cluster.job(last)["JobId"] == array, "the number of all tasks is this one's too"
    kill_all(place.programs_of(TASKS - 1))
    wait_until(lambda: cluster.job(last)["Restarts"] == "1", "the last task does not go back into the queue", 120)
    assert (cluster.job(lost)["JobState"], cluster.job(lost)["Restarts"]) == ("RUNNING", "0")
    cluster.run("scancel", last)
    cluster.kill_node("n2")
    alone = place.alone("tokenize_vision")
    wait_until(lambda: cluster.job(lost)["JobState"] != "RUNNING", "Slurm does not notice", 120)
    cluster.start_node("n2")
    assert cluster.wait_for(merge, "COMPLETED", "FAILED")["JobState"] == "FAILED", place.log(merge)
    assert re.search(r"[1-5] shards are not finished \(codes-00000-000(02|05|08|11|14)", place.log(merge))
    assert [cluster.job(f"{array}_{task}")["Restarts"] for task in (0, 1)] == ["1", "1"]
    assert "exit code 137: back into the queue" in place.log(f"{array}_{on['n1']}")

    _, merge = numbers(place.submit("tokenize_vision", "--array", "0-0"))
    assert cluster.wait_for(merge, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", place.log(merge)
    code, _, errors = result(alone)
    assert code == 0, errors
    assert tree(codes / "array") == tree(codes / "alone")


@pytest.mark.parametrize("program", [curate_images, curate_videos, preprocess_data], ids=lambda module: module.__name__)
def test_what_the_tasks_of_another_program_make(place, program):
    name = Path(program.__file__).stem
    _, merge = numbers(place.submit(name, "--array", "1-2"))
    assert place.cluster.wait_for(merge, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", place.log(merge)
    program.main(place.arguments(name, "alone"))
    made, expected = (tree(place.folder / name / output) for output in ("array", "alone"))
    data = {file for file in expected if file.endswith((".parquet", ".jsonl", ".tar", ".bin", ".idx", ".npz"))}
    assert len(data) >= 3 and all(made[file] == expected[file] for file in data)


def test_captions_of_the_tasks_are_those_of_one_process(place):
    with chat_server(place.folder) as asked:
        place.caption_server = asked.url
        code, output, errors = place.submit("caption", "--array", "1-2")
        assert code == 0, errors
        array = re.fullmatch(r"array job (\d+)\n", output)[1]
        for task in (1, 2):
            state = place.cluster.wait_for(f"{array}_{task}", "COMPLETED", "FAILED")["JobState"]
            assert state == "COMPLETED", place.log(f"{array}_{task}")
        caption.main(place.arguments("caption", "alone"))
    made, expected = (place.folder / "caption" / output for output in ("array", "alone"))
    shards = [(made / f"captions-{shard:05d}-of-00002.jsonl").read_bytes() for shard in (0, 1)]
    assert all(shards) and b"".join(shards) == (expected / "captions-00000-of-00001.jsonl").read_bytes()
