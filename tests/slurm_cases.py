"""A real SLURM of a few nodes on this machine: munged, slurmctld, a slurmd for each node. And a stand-in for training.

Everything lies in one folder; nothing of a SLURM that the machine may have is touched. No systemd and no cgroups: tasks
are told apart by their process tree.
"""

import getpass
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Where Debian puts the daemons, which is not on everybody's PATH.
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))

# cred_expire: how long a requeued job is held before it may start again is made of it; by default two minutes.
CONFIG = """\
ClusterName=openv4
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
PropagateResourceLimits=NONE
{nodes}
PartitionName=all Nodes=node[1-{count}] Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def why_not() -> str:
    """What is missing for a SLURM of one's own; nothing if nothing is."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"no {missing[0]} here: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
    try:
        socket.gethostbyname(_host())
    except OSError:
        return f"this machine's name {_host()} does not resolve, which srun needs: add it to /etc/hosts"
    return ""


def _host() -> str:
    return socket.gethostname().partition(".")[0]


class Job(NamedTuple):
    state: str
    exit_code: str
    restarts: int


class Slurm:
    """A running cluster. ``environment`` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def command(self, *words: str, cwd: Path | None = None) -> str:
        environment = os.environ | self.environment
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> Job:
        shown = dict(
            pair.split("=", 1) for pair in self.command("scontrol", "show", "job", number).split() if "=" in pair
        )
        return Job(shown["JobState"], shown["ExitCode"], int(shown["Restarts"]))

    def wait(self, number: str, reached: Callable[[Job], bool], seconds: float = 120) -> Job:
        """The job, once it is as wanted; fails with the logs of the daemons if that does not come."""
        deadline = time.monotonic() + seconds
        while not reached(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job} after {seconds} s\n{self.logs()}"
            time.sleep(0.2)
        return job

    def ended(self, number: str, seconds: float = 120) -> Job:
        """The job, once it has ended for good; a requeued one has not."""
        return self.wait(number, lambda job: job.state in ENDED, seconds)

    def logs(self, lines: int = 20) -> str:
        return "\n".join(
            line for log in sorted(self.folder.glob("*.log")) for line in [f"-- {log.name}", *_tail(log, lines)]
        )


def _tail(path: Path, lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-lines:]


@contextmanager
def running_slurm(folder: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Slurm]:
    """A cluster with so many nodes in ``folder``, stopped again by the processes' own numbers."""
    folder.mkdir(parents=True)
    folder.chmod(0o711)  # munged asks for it
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    with key.open("wb") as file:
        file.write(secrets.token_bytes(1024))
    ports = free_ports(nodes + 1)
    lines = []
    for number, port in enumerate(ports[1:], 1):
        (folder / f"spool-node{number}").mkdir()
        lines.append(
            f"NodeName=node{number} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000"
        )
    values = {"host": _host(), "user": getpass.getuser(), "folder": folder, "port": ports[0], "count": nodes}
    (folder / "slurm.conf").write_text(CONFIG.format(nodes="\n".join(lines), **values))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    slurm = Slurm(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        ]
        daemons.append(_daemon(slurm, [*munge, "--num-threads=2"]))
        _until(lambda: (folder / "munge.socket").exists(), slurm)
        daemons.append(_daemon(slurm, ["slurmctld", "-D", "-c", "-i"]))
        daemons += [_daemon(slurm, ["slurmd", "-D", "-N", f"node{number}"]) for number in range(1, nodes + 1)]
        _until(lambda: _states(slurm) == ["idle"] * nodes, slurm)
        yield slurm
    finally:
        if len(daemons) > 1:
            subprocess.run(
                ["scancel", "--full", f"--user={values['user']}"], env=os.environ | slurm.environment, timeout=30
            )
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _daemon(slurm: Slurm, words: list[str]) -> subprocess.Popen[bytes]:
    program = shutil.which(words[0], path=PATH)
    assert program
    with (slurm.folder / "daemons.log").open("ab") as log:
        return subprocess.Popen([program, *words[1:]], env=os.environ | slurm.environment, stdout=log, stderr=log)


def _states(slurm: Slurm) -> list[str]:
    done = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"],
        env=os.environ | slurm.environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def _until(reached: Callable[[], bool], slurm: Slurm, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at. (Between here and their use somebody might; rare enough for a test.)"""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


# What the batch script needs to know of training: it takes steps, resumes from what it saved, and when it is told that
# the time is up finishes its step, saves, and exits with 85. A second signal ends it at once.
STAND_IN = """\
#!{python}
import json, os, signal, sys, time
from pathlib import Path

assert sys.argv[1] == "train", sys.argv
values = dict(word.split("=", 1) for word in sys.argv[2:])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(values["output"])
folder.mkdir(parents=True, exist_ok=True)
told = []

def hear(number, frame):
    told.append(number)
    note(signal=signal.Signals(number).name)
    if len(told) > 1:
        os._exit(1)

def note(**event):
    event |= {"rank": rank, "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\\n")

signal.signal(signal.SIGUSR1, hear)
signal.signal(signal.SIGTERM, hear)
state = folder / f"state{rank}"
step = int(state.read_text()) if state.exists() else 0
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
note(start=step, words=sys.argv[2:], **{name: os.environ.get(name) for name in names})
print(f"training from step {step}")
while step < int(values.get("steps") or 10):
    time.sleep(0.1)
    step += 1
    if values.get("seed") == str(rank) and step == 5:
        sys.exit("crashed")
    if told:
        break
state.write_text(str(step))
note(end=step)
sys.exit(85 if told else 0)
"""


def stand_in(folder: Path) -> Path:
    """A program `openv4` in ``folder`` that takes the place of training; ``seed=N`` makes rank N crash."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "openv4"
    program.write_text(STAND_IN.replace("{python}", sys.executable))
    program.chmod(0o755)
    return program


def events(run: Path) -> list[dict[str, Any]]:
    """What the stand-ins of all ranks noted, rank by rank."""
    return [json.loads(line) for file in sorted(run.glob("rank*.jsonl")) for line in file.read_text().splitlines()]
