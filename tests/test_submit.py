"""`openv4 submit`: what it refuses, how it quotes, and its script, run with stand-ins for SLURM's programs.

A real SLURM runs it in test_slurm.py.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_cases import SMALL_RUN, Run, console
from doc_cases import ROOT, commands
from slurm_cases import events, stand_in

from openv4.launch.slurm import REQUEUE_EXIT
from openv4.train.config import TrainConfig, from_yaml, load_config

# Names that a shell, sbatch or a file system would read as something else.
HOSTILE = [
    "it's",
    'say "hi"',
    "a b",
    "$(touch pwned)",
    "`touch pwned`",
    "a;touch pwned",
    "a && touch pwned",
    "a|touch pwned",
    "a > pwned",
    "$HOME",
    "*",
    "a\\",
    "#SBATCH --uid=0",
    "%j",
    "!!",
    "\u4f60",
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in [*os.environ]:
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{text}")
    (folder / name).chmod(0o755)


# Starts the tasks of the script's step side by side, and passes signals on to them and to nothing else, as srun does
# under proctrack/cgroup; the largest exit code is its own.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
at = words.index("bash")
options, command = words[:at], words[at:]
with open(os.environ["CALLS"], "a") as file:
    print("srun", *options, file=file)
nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["TASKS_PER_NODE"])
started = []
def tell(number, frame):
    for process in started:
        process.send_signal(number)
signal.signal(signal.SIGUSR1, tell)
for task in range(nodes * tasks):
    of_task = {"PROCID": task, "NODEID": task // tasks, "LOCALID": task % tasks, "NTASKS": nodes * tasks}
    of_task = {f"SLURM_{key}": str(value) for key, value in of_task.items()}
    started.append(subprocess.Popen(command, env=os.environ | of_task))
codes = [process.wait() for process in started]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("n1\\nn2")
elif sys.argv[1:3] == ["show", "config"]:
    print("ProctrackType           = proctrack/" + os.environ.get("PROCTRACK", "cgroup"))
else:
    with open(os.environ["CALLS"], "a") as file:
        print("scontrol", *sys.argv[1:], file=file)
"""

SBATCH = """
import os, sys
with open(os.environ["CALLS"], "a") as file:
    print("sbatch", *sys.argv[1:], file=file)
print("4711;cluster")
"""


class Job:
    """The batch script, run as SLURM would run it on its first node."""

    def __init__(self, folder: Path, script: str, nodes: int = 2, tasks: int = 1) -> None:
        self.calls, programs = folder / "calls", folder / "programs"
        program(programs, "srun", SRUN)
        program(programs, "scontrol", SCONTROL)
        stand_in(programs)
        self.file = folder / "job.sh"
        self.file.write_text(script)
        self.environment = os.environ | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": str(nodes),
            "TASKS_PER_NODE": str(tasks),
        }

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.file],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **environment: str) -> tuple[int, str]:
        process = self.start(**environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def called(self, name: str) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.split()[0] == name]


@pytest.fixture
def script(openv4: Run) -> Callable[..., str]:
    """What --print prints."""

    def run(*words: object) -> str:
        result = openv4("submit", *words, "--print")
        assert result.code == 0, result
        parsed = subprocess.run(["bash", "-n"], input=result.out, capture_output=True, text=True)
        assert (parsed.returncode, parsed.stderr) == (0, ""), result.out
        return result.out

    return run


# The same run as `openv4 train`'s.


@pytest.mark.parametrize(
    "words",
    [[], ["run=long_context_smoke", "seed=3"], ["run=smoke", "model=nano", "parallel=ep8", "name=x", "data.workers=2"]],
)
def test_it_composes_what_train_composes(words: list[str]) -> None:
    from openv4.launch.submit import SubmitConfig
    from openv4.train.config import load

    submitted = load("submit", SubmitConfig, words)
    wanted = load_config(words)
    assert {key: getattr(submitted, key) for key in vars(wanted)} == vars(wanted)


def test_the_words_are_passed_on_as_typed(script: Callable[..., str]) -> None:
    text = script("run=smoke", "launch=slurm", "launch.nodes=2", "++seed=3", "logging.sample_prompt=And God")
    block = text.partition("train=(\n")[2].partition("\n)")[0]
    assert shlex.split(block) == ["openv4", "train", "run=smoke", "++seed=3", "logging.sample_prompt=And God"]
    assert "launch" not in block


def test_nothing_is_imported_that_takes_seconds() -> None:
    code = (
        "import sys; from openv4.launch import cli; sys.argv = ['openv4', 'submit', 'run=smoke', '--print']; "
        "cli.main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Parts of the script.


def test_the_directives(script: Callable[..., str]) -> None:
    text = script(
        "run=pretrain_flash",
        "launch=slurm",
        "launch.nodes=32",
        "launch.partition=h100",
        "launch.account=a-1",
        "launch.qos=long",
        "launch.time=2-00:00:00",
        "launch.directives=['--reservation=x']",
    )
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        "#SBATCH --job-name=pretrain_flash",
        "#SBATCH --nodes=32",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=0",
        "#SBATCH --partition=h100",
        "#SBATCH --account=a-1",
        "#SBATCH --qos=long",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --exclusive",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=runs/pretrain_flash/slurm/batch-%j-%N.log",
        "#SBATCH --reservation=x",
    ]
    assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text
    assert "data.path is not set" in text  # which --print shows all the same
    assert text.index("#SBATCH --reservation") < text.index(
        "set -euo"
    )  # sbatch reads no further than the first command


def test_the_script_in_the_documentation(openv4: Run) -> None:
    """What docs/cluster.md shows is what its command prints."""
    page = ROOT / "docs" / "cluster.md"
    (command,) = [c.text for c in commands(page) if c.text.startswith("openv4 submit") and c.text.endswith("--print")]
    Path("my_data").mkdir()  # which the page has prepared by then
    result = openv4(*shlex.split(command)[1:])
    assert (result.code, result.err) == (0, "")
    shown = page.read_text().partition("<!-- openv4 submit --print -->\n```text\n")[2].partition("```\n<!-- end -->")[0]
    assert shown == result.out, f"docs/cluster.md should show what this prints: {command}"


def test_one_task_a_node(script: Callable[..., str]) -> None:
    text = script("run=smoke", "launch=slurm", "launch.nodes=2", "launch.tasks=node")
    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --cpus-per-task=96\n" in text


def test_without_gpus(script: Callable[..., str]) -> None:
    text = script("run=smoke", "launch.gpus_per_node=0", "launch.processes_per_node=2", "launch.cpus_per_process=null")
    assert "--gpus-per-node" not in text and "--cpus-per-task" not in text and "#SBATCH --ntasks-per-node=2\n" in text


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_a_container(runtime: str, script: Callable[..., str]) -> None:
    assert "container" not in script("run=smoke") and "apptainer" not in script("run=smoke")
    image, mounts = "my images/openv4.sqsh", "launch.container.mounts=['/data:/data','/runs:/runs']"
    text = script("run=smoke", f"launch.container.image={image}", mounts, f"launch.container.runtime={runtime}")
    if runtime == "pyxis":
        assert f"    '--container-image={image}' \\\n    --container-mounts=/data:/data,/runs:/runs \\\n" in text
    else:
        assert f"    apptainer exec --nv --bind /data:/data --bind /runs:/runs '{image}' openv4 train\n" in text


def test_setup_and_environment(script: Callable[..., str], tmp_path: Path) -> None:
    setup = """launch.setup=["export FROM_SETUP='a b'","echo set up $NOWHERE_SET"]"""
    text = script("run=smoke", "output=x", setup, "launch.env.NCCL_DEBUG=INFO", "launch.env.ODD='it is $HOME'")
    job = Job(tmp_path, text)
    code, output = job.run()
    assert code == 0 and "set up" in output, output
    assert "\nexport NCCL_DEBUG=INFO\nexport ODD='it is $HOME'\n" in text


def test_help_names_the_presets(openv4: Run) -> None:
    result = openv4("submit", "--help")
    assert result.code == 0 and "launch: local, slurm" in result.out and "print: false" in result.out


# The script at work.


def submit_words(*words: str) -> list[str]:
    return ["run=smoke", "output=out", "launch=slurm", "launch.nodes=2", "launch.processes_per_node=1", *words]


@pytest.mark.parametrize(("tasks", "per_node"), [("rank", 2), ("node", 2)])
def test_every_process_learns_its_place(tasks: str, per_node: int, script: Callable[..., str], tmp_path: Path) -> None:
    text = script(*submit_words(f"launch.tasks={tasks}", f"launch.processes_per_node={per_node}"))
    job = Job(tmp_path, text, tasks=per_node if tasks == "rank" else 1)
    code, output = job.run()
    assert code == 0, output
    starts = [event for event in events(Path("out")) if "start" in event]
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in starts] == [("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")]
    for event in starts:
        assert (event["WORLD_SIZE"], event["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert (event["MASTER_ADDR"], event["MASTER_PORT"]) == ("n1", str(15000 + 20007 % 15000))
        assert event["words"] == ["run=smoke", "output=out"]
    assert not job.called("scontrol")
    (step,) = job.called("srun")
    assert "--output=out/slurm/train-%j-%N.log" in step and "--open-mode=append" in step and "--wait=60" in step


def test_where_they_meet_can_be_said(script: Callable[..., str], tmp_path: Path) -> None:
    text = script(*submit_words("launch.master_addr=127.0.0.1", "launch.master_port=29500"))
    assert Job(tmp_path, text).run()[0] == 0
    assert {(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in events(Path("out")) if "start" in e} == {
        ("127.0.0.1", "29500")
    }


def signalled(job: Job, number: signal.Signals, ranks: int) -> tuple[int, str]:
    """Runs the script until all ranks train, signals it, and waits for its end."""
    process = job.start()
    deadline = time.monotonic() + 30
    while len([event for event in events(Path("out")) if "start" in event]) < ranks:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.parametrize("tasks", ["rank", "node"])
def test_usr1_is_told_once_and_requeues(tasks: str, script: Callable[..., str], tmp_path: Path) -> None:
    """Also where the task alone gets srun's signal, as under proctrack/cgroup."""
    per_node = 1 if tasks == "rank" else 2
    words = submit_words("steps=200", f"launch.tasks={tasks}", f"launch.processes_per_node={per_node}")
    job = Job(tmp_path, script(*words))
    code, output = signalled(job, signal.SIGUSR1, 2 * per_node)
    assert code == REQUEUE_EXIT, output
    assert "back into the queue: job 20007" in output
    assert job.called("scontrol") == ["scontrol requeue 20007"]
    noted = events(Path("out"))
    assert [e["signal"] for e in noted if "signal" in e] == ["SIGUSR1"] * 2 * per_node
    ended = {e["rank"]: e["end"] for e in noted if "end" in e}
    assert len(ended) == 2 * per_node and all(step < 200 for step in ended.values())

    for rank, step in ended.items():  # as it goes on after the requeue
        Path("out", f"state{rank}").write_text(str(max(step, 195)))
    code, output = job.run(SLURM_RESTART_COUNT="1")
    assert code == 0 and len(job.called("scontrol")) == 1
    assert [e["start"] for e in events(Path("out")) if e.get("restart") == "1" and "start" in e] == [195] * 2 * per_node


def test_who_is_cancelled_is_not_requeued(script: Callable[..., str], tmp_path: Path) -> None:
    """TERM reaches the tasks by SLURM itself; here the test signals the shell alone, and then the tasks."""
    job = Job(tmp_path, script(*submit_words("steps=30")))
    code, output = signalled(job, signal.SIGTERM, 2)
    assert code == 0 and not job.called("scontrol"), output  # the steps went on to their end
    assert not [event for event in events(Path("out")) if "signal" in event]


@pytest.mark.parametrize("tasks", ["rank", "node"])
def test_a_crash_is_no_requeue(tasks: str, script: Callable[..., str], tmp_path: Path) -> None:
    words = submit_words("seed=1", f"launch.tasks={tasks}", "launch.processes_per_node=2", "steps=20")
    code, output = Job(tmp_path, script(*words), tasks=2 if tasks == "rank" else 1).run()
    assert code == 1 and "crashed" in output


def test_the_node_task_ends_those_who_wait_for_the_crashed(script: Callable[..., str], tmp_path: Path) -> None:
    text = script(*submit_words("seed=1", "launch.tasks=node", "launch.processes_per_node=2", "steps=100000"))
    job = Job(tmp_path, text.replace("crashed + 10", "crashed + 1"), nodes=1)
    start = time.monotonic()
    code, output = job.run()
    assert code == 1 and "crashed" in output and time.monotonic() - start < 20


def test_without_openv4_on_the_path(script: Callable[..., str], tmp_path: Path) -> None:
    job = Job(tmp_path, script(*submit_words()))
    job.environment["PATH"] = f"{tmp_path / 'programs'}:/usr/bin:/bin"
    (tmp_path / "programs" / "openv4").unlink()
    code, output = job.run()
    assert code == 2 and "no openv4 on PATH" in output and not job.called("srun")


# Hostile words.


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_quoted(name: str, script: Callable[..., str], tmp_path: Path) -> None:
    quoted = "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"  # as Hydra wants what is not plain
    for value in {name, quoted}:
        text = script(*submit_words("steps=1", f"name={value}", f"logging.sample_prompt={value}"))
        (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --job-name=")]
        assert set(line.removeprefix("#SBATCH --job-name=")) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-"
        )
        job = Job(tmp_path, text, nodes=1)
        code, output = job.run()
        assert code == 0, output
        words = [event["words"] for event in events(Path("out")) if "words" in event][-1]
        assert words == ["run=smoke", "output=out", "steps=1", f"name={value}", f"logging.sample_prompt={value}"]
    assert not Path("pwned").exists() and not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/etc", "a\nb", "a\n#SBATCH --uid=0", "a\rb", ".hidden", "-x", "a\x1bb"]
)
def test_a_name_that_is_a_path_or_several_lines_is_refused(name: str, refused: Callable[..., str]) -> None:
    message = refused("submit", *submit_words(f"name={name}"), "--print")
    assert message.startswith("name")


@pytest.mark.parametrize("name", [*HOSTILE, "${HOME}", "a\nb", "-x"])
def test_a_hostile_output_is_refused(name: str, refused: Callable[..., str]) -> None:
    message = refused("submit", "run=smoke", f"output='{name}'" if "'" not in name else f'output="{name}"', "--print")
    assert message.startswith(("output", "Interpolation key 'HOME' not found"))
    if "'" not in name:  # also by way of the name
        assert "output" in refused("submit", "run=smoke", f"name='{name}'", "--print") or name in ("a\nb", "-x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch.nodes=0"], "launch.nodes=0 must be at least 1"),
        (["launch.time=tomorrow"], "launch.time=tomorrow: write minutes"),
        (["launch.partition='a b'"], "launch.partition='a b' must be one word"),
        (["launch.partition=-x"], "launch.partition='-x' must be one word"),
        (["launch.qos='x\n#SBATCH --uid=0'"], "launch.qos="),
        (["launch.signal_seconds=5"], "launch.signal_seconds=5 must be 10 to 65535"),
        (["launch.directives=['--nodes=4']"], "launch.directives.0=--nodes=4: the script says --nodes already"),
        (["launch.directives=['rm -rf x']"], "launch.directives.0='rm -rf x' must be an option"),
        (["launch.container.mounts=['a:b']"], "launch.container.mounts=['a:b']: there is no launch.container.image"),
        (["launch=slrum"], "launch=slrum: no such preset; did you mean slurm?"),
        (["launch.node=2"], "launch.node: unknown key; did you mean nodes?"),
        (["modl=nano"], "modl: unknown key; did you mean model?"),
        (["parallel.nproc=2"], "parallel.nproc=2 is for one machine; launch.processes_per_node="),
        (["parallel.expert=3"], "parallel.expert=3 does not divide the number of processes, 8"),
        (["parallel.context=16"], "parallel.context=16 does not divide the number of processes, 8"),
        (
            ["launch.nodes=3", "parallel.expert=12", "launch.gpus_per_node=12"],
            "stage 'short' on 36 processes: parallel.expert=12 does not divide the 16 routed experts",
        ),
        (["parallel.context=8"], "stage 'short' on 8 processes: parallel.context=8 leaves 16 tokens of a row"),
        (["--multirun", "seed=0"], "--multirun: openv4 submit takes key=value and --print"),
    ],
)
def test_what_is_refused(words: list[str], message: str, refused: Callable[..., str]) -> None:
    assert refused("submit", "run=smoke", *words).startswith(message)
    assert not Path("runs").exists()


# Secrets.


@pytest.mark.parametrize("key", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_secrets_are_not_written(
    key: str, refused: Callable[..., str], script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t-value-of-mine"
    monkeypatch.setenv(key, secret)
    assert secret not in script("run=smoke") and key not in script("run=smoke")
    for words in (
        [f"launch.env.{key}={secret}"],
        [f"launch.setup=['export {key}={secret}']"],
        [f"launch.setup=['login {secret}']"],
        [f"name={secret}"],
        [f"launch.directives=['--comment={secret}']"],
    ):
        message = refused("submit", "run=smoke", *words)
        assert key in message and secret not in message
    assert not Path("runs").exists()
    assert "TOKENIZERS_PARALLELISM" in script("run=smoke", "launch.env.TOKENIZERS_PARALLELISM=false")


# Submitting.


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch on PATH; what it was called with."""
    program(tmp_path / "cluster", "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'cluster'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "submitted"))
    return tmp_path / "submitted"


def test_submitted(openv4: Run, cluster: Path) -> None:
    words = ["run=smoke", "launch.nodes=2", "seed=3"]
    shown = openv4("submit", *words, "--print").out
    assert not cluster.exists() and not Path("runs").exists()
    result = openv4("submit", *words)
    assert result.code == 0, result
    assert cluster.read_text() == "sbatch --parsable runs/smoke/slurm/job.sh\n"
    assert Path("runs/smoke/slurm/job.sh").read_text() == shown
    for printed in (
        "job:    4711\n",
        "runs/smoke/slurm/train-4711-<node>.log",
        "runs/smoke/slurm/batch-4711-<node>.log",
    ):
        assert printed in result.out
    assert from_yaml(TrainConfig, Path("runs/smoke/config.yaml").read_text()) == load_config(["run=smoke", "seed=3"])
    assert openv4("submit", *words).code == 0  # again, into the same folder


def test_what_train_would_refuse_is_refused_before_the_queue(
    refused: Callable[..., str], openv4: Run, cluster: Path, small_data: Path
) -> None:
    message = refused("submit", "run=pretrain_flash", "launch.nodes=32")
    assert message.startswith("data.path is not set")
    assert refused("submit", "run=smoke", "data.path=nowhere") == "data.path=nowhere: no such folder"
    Path("full").mkdir()
    Path("full", "thesis.tex").touch()
    assert "holds files that are no run's" in refused("submit", "run=smoke", "output=full")
    Path("file").touch()
    assert refused("submit", "run=smoke", "output=file") == "output=file is a file; choose a folder"
    run = [*SMALL_RUN, f"data={small_data}", "output=run", "model.vocab_size=512"]
    assert console("train", *run, "steps=1") == 0
    assert "seed was 0, now 1" in refused("submit", *run, "launch.nodes=1", "seed=1")
    assert not cluster.exists()
    assert openv4("submit", *run, "steps=2").code == 0


def test_without_sbatch(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused("submit", "run=smoke").startswith("no sbatch on PATH; submit on a login node")
    assert not Path("runs").exists()


def test_sbatch_refuses(refused: Callable[..., str], cluster: Path) -> None:
    text = "import sys; sys.exit('sbatch: error: invalid partition\\nBatch job submission failed')"
    program(cluster.parent / "cluster", "sbatch", text)
    message = refused("submit", "run=smoke")
    assert message == (
        "sbatch refused runs/smoke/slurm/job.sh: sbatch: error: invalid partition Batch job submission failed"
    )


# This machine.


def test_local_is_the_command(openv4: Run, refused: Callable[..., str]) -> None:
    words = ["run=smoke", "launch=local", "name=it's"]
    assert openv4("submit", *words, "--print").out == "openv4 train run=smoke 'name=it'\"'\"'s'\n"
    two = openv4("submit", *words, "launch.processes_per_node=2", "--print").out
    assert shlex.split(two)[2:] == ["run=smoke", "name=it's", "parallel.nproc=2"]
    assert openv4("submit", "run=smoke", "launch=local", "parallel.nproc=2", "--print").out.endswith(
        "parallel.nproc=2\n"
    )
    assert refused("submit", *words, "launch.nodes=2").startswith("launch.nodes=2: launch=local is this machine")
    both = ("parallel.nproc=4", "launch.processes_per_node=2")
    assert refused("submit", *words, *both).startswith("parallel.nproc=4 and launch.processes_per_node=2 differ")
    assert refused("submit", *words, "parallel.nproc=2", "parallel.expert=4").startswith("parallel.expert=4 does not")


@pytest.mark.slow
def test_local_trains(small_data: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("openv4")
    words = [*SMALL_RUN, "model.vocab_size=512", f"data={small_data}", f"output={tmp_path / 'run'}", "steps=1"]
    done = subprocess.run([script, "submit", *words, "launch=local"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1]
