"""``openv4 submit``: a training run as a job of SLURM, or at once on this machine; ``--print`` only shows it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..train.config import ConfigError, TrainConfig, from_yaml, load_config, to_yaml
from ..train.preflight import check_layout, idle
from ..train.secret import secret_in
from .slurm import LaunchConfig, batch_script, check_names, has_control, logs


@dataclass(frozen=True)
class SubmitConfig(TrainConfig):
    """A training run, and where it shall run.

    Attributes:
        launch: where.
        print: show the script, submit nothing.
    """

    launch: LaunchConfig = field(default_factory=LaunchConfig)
    print: bool = False

    @classmethod
    def complete(cls, values: dict[Any, Any]) -> dict[Any, Any]:
        """Variables as ``NAME=value``; and to be shown, a run needs no data yet."""
        launch = values.get("launch")
        if isinstance(launch, dict) and isinstance(launch.get("env"), dict):
            values = values | {"launch": launch | {"env": [_variable(*item) for item in launch["env"].items()]}}
        data = values.get("data")
        if values.get("print") and isinstance(data, dict) and data.get("path") == "???":
            values = values | {"data": data | {"path": None}}
        return super().complete(values)


CONFIG = SubmitConfig


def run(config: SubmitConfig) -> None:
    launch, words = config.launch, train_words(sys.argv[1:])
    local = launch.scheduler == "local"
    if local:
        words = [*words, *_processes(config)]
    elif config.parallel.nproc != 1:
        raise ConfigError(
            f"parallel.nproc={config.parallel.nproc} is for one machine; launch.processes_per_node= says how many a "
            "node has"
        )
    else:
        check_names(config.name, config.output)
    processes = max(launch.per_node, config.parallel.nproc) if local else launch.processes
    check_layout(config, processes)
    notes = idle(config, processes)
    try:
        whole = load_config(words)
    except ConfigError as error:  # all else is checked by now: the data are missing
        if not config.print:
            raise
        notes.append(f"not complete: {error}")
    else:
        if not config.print:
            check_run(whole, inside=launch.container.image is not None)
    if local:
        command = ["openv4", "train", *words]
        if config.print:
            print(shlex.join(command))
        else:
            start(command)
        return
    script = batch_script(launch, config.name, config.output, words, notes)
    refuse_secrets(script)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if config.print:
        print(script, end="")
    else:
        submit(whole, script)


def train_words(words: Sequence[str]) -> list[str]:
    """Of the words after `openv4` those that `openv4 train` takes, as they were typed."""
    kept = []
    for word in words[1:] if words[:1] == ["submit"] else words:  # Hydra's own flags come without the command
        key = word.partition("=")[0].lstrip("+~")
        if word == "--print" or key in ("print", "launch") or key.startswith("launch."):
            continue
        if word.startswith("-"):
            raise ConfigError(f"{word}: openv4 submit takes key=value and --print; submit several runs one by one")
        if has_control(word):
            raise ConfigError(f"{key}: {word!r} holds a line break or another control character; leave it out")
        kept.append(word)
    return kept


def _variable(name: object, value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
    return f"{name}={text}"


def _processes(config: SubmitConfig) -> list[str]:
    """What tells `openv4 train` how many processes ``launch`` asks for on this machine."""
    launch, given = config.launch, config.parallel.nproc
    if launch.nodes != 1:
        raise ConfigError(f"launch.nodes={launch.nodes}: launch=local is this machine; use launch=slurm")
    if given not in (1, launch.per_node) and launch.per_node != 1:
        raise ConfigError(f"parallel.nproc={given} and launch.processes_per_node={launch.per_node} differ; keep one")
    return [f"parallel.nproc={launch.per_node}"] if launch.per_node not in (1, given) else []


def check_run(config: TrainConfig, inside: bool = False) -> None:
    """What `openv4 train` would refuse in the queue: data that are not there, a folder that holds something else.

    Args:
        inside: paths are those of a container, and cannot be looked up here.
    """
    folder = Path(config.output)
    paths = {"data.path": config.data.path, "model.pretrained": config.pretrained}
    paths |= {f"data.sources.{index}": source.path for index, source in enumerate(config.data.sources)}
    for key, path in paths.items():
        if path is not None and not inside and not Path(path).exists():
            raise ConfigError(f"{key}={path}: no such folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output={folder} is a file; choose a folder")
    there = folder / "config.yaml"
    if not there.exists():
        if folder.is_dir() and any(path.name not in (".lock", ".config.yaml") for path in folder.iterdir()):
            raise ConfigError(f"output={folder} holds files that are no run's; choose another folder")
    elif (folder / "checkpoints" / "latest").exists():
        from ..train.folder import differences  # imports torch, two seconds

        if changed := differences(from_yaml(TrainConfig, there.read_text()), config):
            raise ConfigError(f"output={folder} holds another run ({'; '.join(changed)}); choose another output")


def refuse_secrets(script: str) -> None:
    """Refuses a script that holds the value of a secret of this shell, wherever it came from."""
    if name := secret_in(script):
        raise ConfigError(f"the script would hold the value of {name}; leave it out: the job inherits the variable")


def start(command: Sequence[str]) -> None:
    """Becomes `openv4 train`."""
    program = shutil.which(sys.argv[0]) or shutil.which("openv4")
    if program is None:
        raise ConfigError("no openv4 on PATH; activate its environment")
    sys.stdout.flush()
    os.execv(program, list(command))


def submit(config: TrainConfig, script: str) -> None:
    """Writes the script below the run's folder and hands it to sbatch."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("no sbatch on PATH; submit on a login node of the cluster, or see the script with --print")
    folder = Path(config.output)
    (folder / "slurm").mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():  # by which `openv4 train` knows the folder for this run's
        _write(folder / "config.yaml", to_yaml(config))
    file = folder / "slurm" / "job.sh"
    _write(file, script)
    done = subprocess.run([sbatch, "--parsable", str(file)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or not re.fullmatch(r"\d+", job):
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise ConfigError(f"sbatch refused {file}: {reason}")
    batch, train = (name.replace("%j", job).replace("%N", "<node>") for name in logs(config.output))
    print(f"job:    {job}")
    print(f"script: {file}")
    print(f"logs:   {train}, a line beginning with its rank")
    print(f"        {batch}, of the batch script")
    print(f"watch:  squeue --job={job}; openv4 report {shlex.quote(config.output)}")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.rename(path)
