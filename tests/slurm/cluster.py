"""A real Slurm of two nodes on this machine, with state, ports and keys of its own under one folder.

Two slurmds share the host: `NodeHostname` is this machine and each has a port. Nothing of /etc/slurm is read.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PATIENCE_S = 60

CONFIGURATION = """
ClusterName=emu3
# The ranks of a job meet at a port that follows from its number: two clusters on this machine have other numbers.
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for its credential to expire before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
# The default, cgroup, needs a machine that delegates them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=10
# A job of the tests is told that its time is nearly over; none is to be killed for it on a slow machine.
OverTimeLimit=30
# More CPUs than this machine may have.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4 Gres=gpu:2
PartitionName=work Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=off
"""


class Cluster:
    """munged, slurmctld and the slurmds of nodes n1 and n2."""

    def __init__(self, folder: Path) -> None:
        """Write the configuration; `start` starts the daemons."""
        self.folder = folder
        self.environment = {**_outside_slurm(os.environ), "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        ports = _free_ports(3)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                user=pwd.getpwuid(os.getuid()).pw_name,
                folder=folder,
                first_job=1 + 100 * secrets.randbelow(100),
                controller_port=ports[0],
                first_port=ports[1],
                second_port=ports[2],
            )
        )
        # Slurm wants a device file for each; any will do, as nothing computes on them.
        (folder / "gres.conf").write_text("NodeName=n[1-2] Name=gpu File=/dev/null,/dev/zero\n")

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        names = ("socket", "pid", "log", "seed")
        files = [f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{name}" for name in names]
        self._start("munged", "--foreground", "--force", f"--key-file={self.folder}/munge.key", *files)
        wait_until(lambda: (self.folder / "munge.socket").exists(), "munged has no socket")
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)

    def start_node(self, node: str) -> None:
        """Start the slurmd of `node`, also after `kill_node`."""
        self._start("slurmd", "-D", "-N", node, name=node)
        wait_until(lambda: "IDLE" in self.run("scontrol", "show", "node", node), f"{node} does not become idle")

    def kill_node(self, node: str) -> None:
        """kill -9 of everything that runs on `node`, as a power cut does."""
        doomed = [process for process in psutil.process_iter() if _runs_on(process, node, self.folder)]
        self._daemons[node].kill()
        kill_all(doomed)
        self._daemons.pop(node).wait()

    def run(self, *command: str) -> str:
        """What a Slurm command prints."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What slurmctld knows of a job: `JobState`, `Restarts`, ..."""
        fields = self.run("scontrol", "show", "job", "--oneliner", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, number: str, *states: str, patience_s: float = 240) -> dict[str, str]:
        """Wait until a job is in one of `states`; returns the job."""
        wait_until(lambda: self.job(number)["JobState"] in states, f"job {number} is not {states}", patience_s)
        return self.job(number)

    def stop(self) -> None:
        """End jobs and daemons; no process stays."""
        for process in self._daemons.values():
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        kill_all(process for process in psutil.process_iter() if _belongs(process, self.folder))

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        log = (self.folder / f"{name or program}.out").open("a")
        self._daemons[name or program] = subprocess.Popen(
            [path, *arguments], env=self.environment, stdout=log, stderr=log
        )


def wait_until(holds: Callable[[], bool], otherwise: str, patience_s: float = PATIENCE_S) -> None:
    """Poll until `holds()`; fail with `otherwise` after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{otherwise} after {patience_s} s"
        time.sleep(0.2)


def kill_all(processes: Iterator[psutil.Process] | list[psutil.Process]) -> None:
    """SIGKILL."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def environment_of(process: psutil.Process) -> dict[str, str]:
    """The environment that a process was started with; empty where it has ended."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def missing_programs() -> list[str]:
    """What a Slurm needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def _belongs(process: psutil.Process, folder: Path) -> bool:
    """Whether a process is a task of this Slurm, or a slurmstepd, whose title has taken its environment's place."""
    is_task = environment_of(process).get("SLURM_CONF") == str(folder / "slurm.conf")
    return is_task or any(path.startswith(str(folder)) for path in _files_of(process))


def _runs_on(process: psutil.Process, node: str, folder: Path) -> bool:
    is_task = _belongs(process, folder) and environment_of(process).get("SLURMD_NODENAME") == node
    return is_task or str(folder / f"slurmd-{node}.log") in _files_of(process)


def _files_of(process: psutil.Process) -> list[str]:
    try:
        return [file.path for file in process.open_files()]
    except (psutil.Error, OSError):
        return []


def _outside_slurm(environment: os._Environ) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(("SLURM_", "SBATCH_", "EMU3_"))}


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
