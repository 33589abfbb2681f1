"""The batch script of a run under SLURM: what is asked for, who starts the processes, how signals reach them.

Nothing here imports torch. The script is written for people: ``openv4 submit ... --print`` shows it.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..train.config import REQUEUE_EXIT, ConfigError
from ..train.secret import is_secret

# How long the other processes may take to end once one has: a crash leaves them waiting for it, a requeue ends all
# within moments. Also what the last words of rank 0 (plot, W&B) may take.
WAIT_SECONDS = 60

_WORD = re.compile(r"[\w.,:@+/=-]+", re.ASCII)
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive"),
    *("partition", "account", "qos", "time", "requeue", "no-requeue", "signal", "open-mode", "output", "error"),
)


@dataclass(frozen=True)
class ContainerConfig:
    """Attributes:
    image: in which the processes run, as pyxis or apptainer names it; null: in none.
    mounts: folders that are seen inside, as source:target; data, output and working folder are needed.
    runtime: pyxis (options of srun) or apptainer (a command before ours).
    """

    image: str | None = None
    mounts: tuple[str, ...] = ()
    runtime: Literal["pyxis", "apptainer"] = "pyxis"

    def __post_init__(self) -> None:
        if self.mounts and not self.image:
            raise ConfigError(f"launch.container.mounts={list(self.mounts)}: there is no launch.container.image")
        for text in (self.image or "", *self.mounts):
            if has_control(text) or text.startswith("-"):
                raise ConfigError(f"launch.container: {text!r} is neither an image nor source:target")


@dataclass(frozen=True)
class LaunchConfig:
    """Where a run runs. `conf/launch/*.yaml` holds the values.

    Attributes:
        scheduler: slurm, or local: this machine, at once.
        nodes: how many.
        gpus_per_node: of each; 0 asks for none.
        processes_per_node: null: one for each GPU, or one.
        tasks: who starts them. rank: srun, each as a task of its own. node: srun starts one task a node, and that the
            processes.
        cpus_per_process: null leaves it to SLURM.
        memory: of each node, as SLURM writes it; "0": all; null leaves it to SLURM.
        exclusive: no other job on the nodes.
        partition, account, qos: null leaves each to SLURM.
        time: limit, as SLURM writes it; then the run is saved, requeued and resumed.
        signal_seconds: so long before the limit the processes are told; a step and a save must fit into it.
        master_addr, master_port: where the processes meet; null: the first node, and a port that follows from the job.
        container: to run in.
        setup: lines of shell that come first, such as `module load cuda`.
        env: variables of the processes; a mapping in YAML. No secrets: these come from the environment of sbatch.
        directives: more options of sbatch, such as --reservation=x.
    """

    scheduler: Literal["local", "slurm"] = "local"
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    tasks: Literal["rank", "node"] = "rank"
    cpus_per_process: int | None = None
    memory: str | None = None
    exclusive: bool = False
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    signal_seconds: int = 300
    master_addr: str | None = None
    master_port: int | None = None
    container: ContainerConfig = field(default_factory=ContainerConfig)
    setup: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, least in (("nodes", 1), ("gpus_per_node", 0), ("processes_per_node", 1), ("cpus_per_process", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"launch.{key}={value} must be at least {least}")
        if not 10 <= self.signal_seconds <= 65535:
            raise ConfigError(
                f"launch.signal_seconds={self.signal_seconds} must be 10 to 65535: a save must fit into it"
            )
        if self.master_port is not None and not 1024 <= self.master_port < 65536:
            raise ConfigError(f"launch.master_port={self.master_port} must be 1024 to 65535, or null")
        for key in ("memory", "partition", "account", "qos", "time", "master_addr"):
            value = getattr(self, key)
            if value is not None and (not _WORD.fullmatch(value) or value.startswith("-")):
                raise ConfigError(f"launch.{key}={value!r} must be one word of letters, digits and .,:@+/=-")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(f"launch.time={self.time}: write minutes, hours:minutes:seconds or days-hours")
        for index, line in enumerate(self.setup):
            if has_control(line):
                raise ConfigError(f"launch.setup.{index}={line!r} must be one line")
            for name in re.findall(r"(\w+)=", line):
                _refuse_secret(f"launch.setup.{index}", name)
        for variable in self.env:
            name, equals, value = variable.partition("=")
            if not equals or not _NAME.fullmatch(name) or has_control(value):
                raise ConfigError(f"launch.env.{name}={value!r}: must be the name of a variable and one line of text")
            _refuse_secret("launch.env", name)
        for index, directive in enumerate(self.directives):
            name = directive.removeprefix("--").partition("=")[0]
            if not directive.startswith("--") or has_control(directive):
                raise ConfigError(
                    f"launch.directives.{index}={directive!r} must be an option of sbatch such as --nice=5"
                )
            if name in _OURS:
                raise ConfigError(f"launch.directives.{index}={directive}: the script says --{name} already")

    @property
    def per_node(self) -> int:
        """Training processes of each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """All training processes."""
        return self.nodes * self.per_node


def has_control(text: str) -> bool:
    """Whether a text holds a line break or another control character."""
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def _refuse_secret(where: str, name: str) -> None:
    if is_secret(name):
        raise ConfigError(
            f"{where}: {name} looks like a secret, and the script is a file; leave it out, and export {name} in the "
            "shell that submits: the job inherits it"
        )


def check_names(name: str, output: str) -> None:
    """Refuses what a job's name or the names of its logs cannot hold; all other values of a run are quoted.

    Raises:
        ConfigError: a name that is a path, an output folder that sbatch would read otherwise.
    """
    if "/" in name or name.startswith((".", "-")) or has_control(name):
        raise ConfigError(
            f"name={name!r}: must be no path and begin with a letter or digit; output= says where to write"
        )
    if not _WORD.fullmatch(output) or output.startswith("-"):
        raise ConfigError(
            f"output={output!r}: the names of the job's logs begin with it, where SLURM expands or ends at what is no "
            "letter, digit or one of .,:@+/=_-; choose another folder"
        )


def logs(output: str) -> tuple[str, str]:
    """The logs of the batch script and of the processes, with SLURM's %j for the job and %N for the node."""
    return f"{output}/slurm/batch-%j-%N.log", f"{output}/slurm/train-%j-%N.log"


def batch_script(launch: LaunchConfig, name: str, output: str, train: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The script that sbatch takes.

    Args:
        name, output: of the run, which ``check_names`` lets pass.
        train: what follows `openv4 train`, word by word, not quoted.
        notes: lines that the script shall begin with.
    """
    batch_log, train_log = logs(output)
    setup = [
        "# launch.setup; modules and conda read variables that are not set.",
        "set +u",
        *launch.setup,
        "set -u",
        "",
    ]
    command = [*_in_container(launch.container), "openv4", "train"]
    parts = [
        "#!/bin/bash",
        f"# {_comment(name)}: {launch.processes} processes on {launch.nodes} nodes; written by openv4 submit.",
        "# After a requeue SLURM runs this file again, and openv4 train goes on from the newest checkpoint.",
        *(f"# Note: {_comment(note)}" for note in notes),
        *_directives(launch, name, batch_log),
        _SIGNALS,
        *(setup if launch.setup else []),
        "# Output at once; nothing of the working folder in the way of Python's modules.",
        "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1",
        *_exports(launch.env),
        "",
        *_rendezvous(launch),
        "",
        "train=(",
        f"    {shlex.join(command)}",
        *(f"    {shlex.quote(word)}" for word in train),
        ")",
        *([] if launch.container.image else [_ON_PATH]),
        "",
        _RANK_TASK if launch.tasks == "rank" else _NODE_TASK.replace("PER_NODE", str(launch.per_node)),
        f"# Whoever ends first, with whatever code: the others have {WAIT_SECONDS} seconds more.",
        "srun \\",
        *(f"    {shlex.quote(option)} \\" for option in _srun_options(launch, train_log)),
        '    bash -c "$start" openv4 "${train[@]}" &',
        _END,
    ]
    return "\n".join(parts).replace("REQUEUE_EXIT", str(REQUEUE_EXIT))


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _exports(variables: Sequence[str]) -> Iterator[str]:
    for variable in variables:
        name, _, value = variable.partition("=")
        yield f"export {name}={shlex.quote(value)}"


def _directives(launch: LaunchConfig, name: str, log: str) -> Iterator[str]:
    ranks = launch.tasks == "rank"
    options = {
        "job-name": re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:60],
        "nodes": launch.nodes,
        "ntasks-per-node": launch.per_node if ranks else 1,
        "gpus-per-node": launch.gpus_per_node or None,
        "cpus-per-task": _cpus_per_task(launch),
        "mem": launch.memory,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "time": launch.time,
    }
    yield from (f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None)
    if launch.exclusive:
        yield "#SBATCH --exclusive"
    yield "#SBATCH --requeue"
    yield f"#SBATCH --signal=B:USR1@{launch.signal_seconds}"
    yield "#SBATCH --open-mode=append"
    yield f"#SBATCH --output={log}"
    yield from (f"#SBATCH {directive}" for directive in launch.directives)


def _cpus_per_task(launch: LaunchConfig) -> int | None:
    if launch.cpus_per_process is None:
        return None
    return launch.cpus_per_process * (1 if launch.tasks == "rank" else launch.per_node)


def _rendezvous(launch: LaunchConfig) -> Iterator[str]:
    yield "# Where the processes meet."
    if launch.master_addr:
        yield f"MASTER_ADDR={shlex.quote(launch.master_addr)}"
    else:  # sed reads to the end: head would stop early, which fails the pipe where there are many nodes
        yield 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)'
    # Below the ports that Linux gives to whoever asks for any.
    yield f"MASTER_PORT={launch.master_port or '$((15000 + SLURM_JOB_ID % 15000))'}"
    yield "export MASTER_ADDR MASTER_PORT"


def _in_container(container: ContainerConfig) -> list[str]:
    if not container.image or container.runtime != "apptainer":
        return []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", "--nv", *binds, container.image]


def _srun_options(launch: LaunchConfig, log: str) -> Iterator[str]:
    yield from ("--export=ALL", "--label", "--open-mode=append", f"--output={log}")
    if (cpus := _cpus_per_task(launch)) is not None:  # which srun does not take over from sbatch
        yield f"--cpus-per-task={cpus}"
    yield from ("--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}")
    container = launch.container
    if container.image and container.runtime == "pyxis":
        yield f"--container-image={container.image}"
        if container.mounts:
            yield f"--container-mounts={','.join(container.mounts)}"


_SIGNALS = """
set -euo pipefail

# Before the time is up USR1 comes, to this shell alone, which passes it on: every process finishes its step, saves and
# exits with REQUEUE_EXIT. TERM (scancel, preemption, the limit) comes to shell and processes alike: passed on, it would
# be there twice. Who cancels a job does not want it back in the queue.
step='' told=0 cancelled=0
trap 'told=$((told + 1)); [[ -z $step ]] || kill -USR1 "$step" || true' USR1
trap 'told=$((told + 1)); cancelled=1' TERM
"""

_ON_PATH = """\
if ! command -v openv4 >/dev/null; then
    echo "no openv4 on PATH; activate its environment in launch.setup, or before you submit" >&2
    exit 2
fi"""

# exec: the training process is the task itself, so that srun's signals and exit codes are its own.
_RANK_TASK = """\
# Each task of srun becomes a training process. USR1 ends a process that does not expect it: until training does, it is
# ignored.
start='
trap "" USR1
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
exec "$@"
'
"""

_NODE_TASK = """\
# Each task of srun, one a node, starts the node's training processes and ends with them. proctrack/cgroup signals the
# task alone, which passes it on; the other kinds signal whatever it has started.
pass_on=0
[[ "$(scontrol show config)" != *proctrack/cgroup* ]] || pass_on=1
export pass_on
start='
running=() code=0 crashed=
pass_on() { [[ $pass_on == 0 ]] || kill -"$1" "${running[@]}" 2>/dev/null || true; }
trap "pass_on USR1" USR1
trap "pass_on TERM" TERM
export WORLD_SIZE=$((SLURM_NNODES * PER_NODE)) LOCAL_WORLD_SIZE=PER_NODE
for ((LOCAL_RANK = 0; LOCAL_RANK < PER_NODE; LOCAL_RANK++)); do
    export LOCAL_RANK RANK=$((SLURM_NODEID * PER_NODE + LOCAL_RANK))
    (trap "" USR1; exec "$@") &  # until training expects it
    running+=($!)
done
while ((${#running[@]})); do
    sleep 1 &
    wait $! || true  # a signal ends it
    left=()
    for process in "${running[@]}"; do
        if kill -0 "$process" 2>/dev/null; then
            left+=("$process")
            continue
        fi
        wait "$process" && result=0 || result=$?
        if [[ -z $crashed ]] && ((result != 0 && result != REQUEUE_EXIT)); then
            code=$result crashed=$SECONDS
        elif ((code == 0)); then
            code=$result
        fi
    done
    running=("${left[@]}")
    # Without it the others wait in vain.
    [[ -z $crashed ]] || ((SECONDS < crashed + 10)) || kill -KILL "${running[@]}" 2>/dev/null || true
done
exit "$code"
'
"""

_END = """\
step=$!

# A signal ends wait, not the step: then it is waited for again. 127: it had ended, and its code is known.
code=127
while true; do
    before=$told
    wait "$step" && result=0 || result=$?
    ((result == 127)) || code=$result
    ((told != before && result != 127)) || break
done

if ((code == REQUEUE_EXIT && cancelled == 0)); then
    echo "saved; back into the queue: job $SLURM_JOB_ID, requeued ${SLURM_RESTART_COUNT:-0} times before"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
