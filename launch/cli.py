"""The ``openv4`` console script: finds the command, composes its config, and turns bad input into one clear line."""

import atexit
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, get_origin, get_type_hints

import hydra
from omegaconf import DictConfig

from ..data.config import DataError
from ..model.config import ModelConfigError, WeightsError
from ..train.config import (
    CONF,
    REQUEUE_EXIT,
    CheckpointError,
    ConfigError,
    DivergedError,
    IntegrityError,
    Preempted,
    StoppedElsewhere,
    from_yaml,
    load,
    normalize,
    quoted,
)
from ..train.secret import redacted
from .output import lasting_output


class Command(NamedTuple):
    help: str
    example: str


COMMANDS = {
    "prepare": Command("text files to token shards", "openv4 prepare input=my_texts output=my_data"),
    "preview": Command(
        "a conversation, and what training on it would count", "openv4 preview input=chat.jsonl tokenizer=my_model"
    ),
    "train": Command("pretrain, fine-tune, or resume a run", "openv4 train run=smoke data=my_data"),
    "evaluate": Command("loss and bits per byte on held-out text", "openv4 evaluate checkpoint=runs/smoke"),
    "generate": Command(
        "continue a text, or reply with chat=true", "openv4 generate checkpoint=runs/smoke prompt='In the beginning'"
    ),
    "export": Command(
        "write the released format, which transformers loads", "openv4 export checkpoint=runs/smoke output=my_model"
    ),
    "inspect": Command("what a folder of weights holds", "openv4 inspect DeepSeek-V4-Flash"),
    "plan": Command(
        "memory, time and communication of a run on a cluster, before it runs",
        "openv4 plan run=pretrain_flash nodes=128 --search",
    ),
    "submit": Command("a run as a job of SLURM", "openv4 submit run=smoke launch=slurm launch.nodes=2 --print"),
    "report": Command("a run's curves as one HTML page, several compared", "openv4 report runs/smoke"),
    "merge": Command("fold LoRA adapters into their weights", "openv4 merge adapter=runs/lora output=my_model"),
}

# What users cause and can mend. Anything else is a fault of ours and keeps its traceback.
USER_ERRORS = (ConfigError, ModelConfigError, DataError, WeightsError, CheckpointError, DivergedError, OSError)
EXPECTED = (*USER_ERRORS, IntegrityError, Preempted, StoppedElsewhere)


def main() -> None:
    """Entry point: ``openv4 <command> [key=value ...]``; every command is a Hydra application."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return
    if name not in COMMANDS:
        print(f"error: openv4 {name}: no such command; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.excepthook = _crash
    # `spawn`ed and launched children must not find our folders (kernels, data, ...) as top-level modules.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    module = importlib.import_module(f".{name}", __package__)
    arguments = _spelled_out(module.CONFIG, getattr(module, "POSITIONAL", None), arguments)
    way_on = "; the same command resumes from the last checkpoint" if name == "train" else ""
    with lasting_output() if name == "train" else nullcontext(), _ending(f"interrupted{way_on}\n"):
        if any(argument.startswith("-") for argument in arguments):
            _hydra_application(name, module.CONFIG, module.run, arguments)
        else:
            module.run(load(name, module.CONFIG, arguments))


def main_of_process(config: str) -> None:
    """Of a process that ``openv4 train parallel.nproc=`` has started, with the config in a file."""
    from .train import CONFIG, die_with_parent, run

    sys.excepthook = _crash
    die_with_parent()
    with lasting_output(), _ending():
        run(from_yaml(CONFIG, Path(config).read_text()))


@contextmanager
def _ending(interrupted: str = "") -> Iterator[None]:
    """How a command ends, by what it raises; ``interrupted`` is said of Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(interrupted)
        _exit(130)
    except EXPECTED as error:
        _fail(error)
    if _one_of_several():
        _exit(0)


def _spelled_out(schema: type[Any], positional: str | None, arguments: list[str]) -> list[str]:
    """``--name`` of a boolean key as ``name=true``, and the words before all else as the positional key's value(s)."""
    hints = get_type_hints(schema)
    flags = {f"--{name.replace('_', '-')}": f"{name}=true" for name, hint in hints.items() if hint is bool}
    rest = [argument for argument in arguments if argument not in flags]
    words = (
        list(takewhile(lambda word: "=" not in word and word[:1] not in ("-", "+", "~"), rest)) if positional else []
    )
    several = positional is not None and get_origin(hints[positional]) is tuple
    if not several:
        words = words[:1]
    value = f"[{','.join(map(quoted, words))}]" if several else "".join(words)
    given = [f"{positional}={value}"] if words else []
    return [*given, *rest[len(words) :], *(flags[argument] for argument in arguments if argument in flags)]


def _hydra_application(name: str, schema: type[Any], run: Callable[[Any], None], arguments: list[str]) -> None:
    """Hydra's own flags: --help, --cfg job, --multirun and the rest."""
    flags = [argument for argument in arguments if argument.startswith("-") or "=" not in argument]
    overrides = normalize(name, schema, [argument for argument in arguments if argument not in flags])
    # Hydra's own logging would leave a file in the working directory.
    sys.argv = [f"openv4 {name}", *flags, "hydra/job_logging=none", *overrides]

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def application(config: DictConfig) -> None:
        try:
            run(from_yaml(schema, config))
        except EXPECTED as error:
            _fail(error)

    application()


def _fail(error: Exception) -> NoReturn:
    """One line and exit code 2; OPENV4_TRACEBACK=1 shows where the error came from. A run that a signal has stopped
    ends with REQUEUE_EXIT."""
    if isinstance(error, StoppedElsewhere):
        _exit(2)
    rank = os.environ.get("RANK", "0")
    if isinstance(error, Preempted):
        if rank == "0":
            print(error, file=sys.stderr)
        _exit(REQUEUE_EXIT)
    if os.environ.get("OPENV4_TRACEBACK"):
        raise error
    where = "error:" if rank == "0" else f"error in process {rank}:"
    print(where, redacted(re.sub(r"\s*\n\s*", " ", str(error))), file=sys.stderr)
    _exit(2)


def _crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of ours: the traceback, without what must not be in a log."""
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
    if _one_of_several():
        _exit(1)


def _exit(code: int) -> NoReturn:
    """One process of several ends at once. At the interpreter's own end a thread of gloo that lets go of a tensor asks
    for the interpreter's lock, and is aborted. ``destroy_process_group`` does not end these threads: default arguments
    in torch.distributed.nn.functional, imported after the group was made, hold it."""
    if _one_of_several():
        if code == 0:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _one_of_several() -> bool:
    from ..train.preflight import launched  # which most commands need not load

    return launched()


def _help() -> str:
    lines = ["openv4: DeepSeek-V4's training recipe, reproduced", "", "usage: openv4 <command> [key=value ...]", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:10}{command.help}", f"  {'':10}  {command.example}"]
    lines += ["", "openv4 <command> --help shows the command's settings; --cfg job prints what would run."]
    return "\n".join(lines)
