"""The folder of a run: whose it is, and what describes the run in it."""

import fcntl
import os
import pwd
import socket
import stat
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from ..model.released import copy_companions, copy_tokenizer
from .checkpoint import latest_checkpoint, remove_leftovers
from .config import ConfigError, TrainConfig, from_yaml, leaves, to_yaml
from .dataset import Dataset
from .environment import write_environment
from .secret import secret_in


def claim_folder(run: Path, config: TrainConfig, stack: ExitStack) -> None:
    """Creates the run's folder or recognises it as this run's, and locks it."""
    config_file = run / "config.yaml"
    if run.exists() and not run.is_dir():
        raise ConfigError(f"output={run} is a file; choose a folder")
    ours = (".lock", ".config.yaml")  # all there is if a run was killed at once
    if run.is_dir() and not config_file.exists() and any(path.name not in ours for path in run.iterdir()):
        raise ConfigError(f"output={run} holds files that are no run's; choose another folder")
    if name := secret_in("\n".join(str(value) for _, value in leaves(asdict(config)))):
        raise ConfigError(
            f"the config holds the value of {name}, and would be written to {config_file}; leave it out: who needs it "
            "reads the variable"
        )
    run.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((run / ".lock").open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however this process ends
    except OSError:
        lock.seek(0)
        owner = f" ({found})" if (found := lock.read().strip()) else ""
        raise ConfigError(
            f"output={run}: another process{owner} trains here; wait for it or choose another folder"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    if latest_checkpoint(run / "checkpoints") is None:
        write_config(run, config)  # whatever was configured here before has trained nothing
    else:
        try:
            changed = differences(from_yaml(TrainConfig, config_file.read_text()), config)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{config_file}: unreadable ({error}); restore it, choose another output or remove the folder"
            ) from None
        if changed:
            raise ConfigError(
                f"output={run} holds another run ({'; '.join(changed)}); choose another output or remove the folder"
            )
    (run / "checkpoints").mkdir(exist_ok=True)
    remove_leftovers(run / "checkpoints")
    if line := exposed(run):
        print(f"warning: {line}", file=sys.stderr)


def exposed(run: Path) -> str:
    """A line that says who besides the user and root could change the files of a run; nothing where nobody could.

    Groups share folders on clusters, and are trusted. A parent such as /tmp may be anybody's: its sticky bit keeps
    others off the run.
    """
    newest = latest_checkpoint(run / "checkpoints")
    for path in (run, run / "checkpoints", *([] if newest is None else [newest])):
        status = path.stat()
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to another user ({_name(status.st_uid)}), who may change this run; copy it to go on"
        if status.st_mode & stat.S_IWOTH:
            return f"anybody on this machine may change {path}, and with it this run; chmod o-w {path}"
    mode = run.resolve().parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return f"anybody on this machine may replace {run}: its parent is open to all; chmod o-w {run.resolve().parent}"
    return ""


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def write_description(run: Path, config: TrainConfig, data: Dataset) -> None:
    """What tells of a run, and what goes with its weights."""
    write_config(run, config)
    if config.pretrained:
        copy_companions(Path(config.pretrained), run)
    copy_tokenizer(data.tokenizer_path, run, config.model)


def write_config(run: Path, config: TrainConfig) -> None:
    """What describes the run, once it is sure that the folder is this run's."""
    temporary = run / ".config.yaml"
    temporary.write_text(to_yaml(config))
    temporary.rename(run / "config.yaml")
    write_environment(run / "env.json")


def differences(before: TrainConfig, now: TrainConfig) -> list[str]:
    """What makes ``now`` another run than ``before``: all that decides a weight. (Data is told by its fingerprint.)"""
    old, new = dict(leaves(asdict(before))), dict(leaves(asdict(now)))
    decisive = ("seed", "grad_clip", "model", "optim", "precision", "stages", "epochs", "lora")
    keys = [key for key in old | new if key.split(".")[0] in decisive and old.get(key) != new.get(key)]
    found = [f"{key} was {old.get(key)}, now {new.get(key)}" for key in keys[:4]]
    return [*found, f"{len(keys) - 4} more"] if len(keys) > 4 else found
