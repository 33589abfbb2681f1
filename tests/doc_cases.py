"""What the documentation says, taken apart: its pages, code blocks, commands, links and names.

A new command in the text needs no word here if it is an `openv4` command that works in the folder that `test_docs.py`
prepares: it is run. Any other goes into `RUN_WHOLE_ELSEWHERE` or `NOT_HERE`.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from openv4.train.config import CONF, load_config

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
)

# What takes minutes: the complete command is run by a test, or by a step of .ci/run.
RUN_WHOLE_ELSEWHERE = {
    "make smoke": "tests/test_smoke.py::test_smoke_beats_a_byte_model",
    "make tiny-v4": "tests/test_finetune_learns.py::test_answers_take_the_form_of_the_conversations",
    "make setup": ".ci/run",
    "make check": ".ci/run",
    "make test": ".ci/run",
    "make test-all": ".ci/run",
    "make docs": ".ci/run",
    "make bench": "tests/test_benchmark.py",
    "make soak KILLS=1000": "tests/test_soak.py::test_thirty_kills_change_nothing",
    "make figures": "tests/test_docs.py::test_the_drawing_of_the_imports_is_that_of_the_code",
    "openv4 train run=long_context_smoke": "tests/test_smoke.py::test_long_context_trains_its_indexer",
}

# What cannot be run here, and why. Of an `openv4 train`, the configuration is composed and checked.
NOT_HERE = {
    "make gpu": "a CUDA device; tests/test_gpu.py holds its tests",
    "hf download": "the network, and 160 GB",
    "vllm serve": "several GPUs; not a program of ours",
    "source .venv/bin/activate": "tests have an environment already",
    "pre-commit install": "writes to .git",
    "openv4 submit launch=slurm": "a cluster; tests/test_slurm.py submits to one of its own",
    "squeue --me": "a cluster",
    "tail -f": "goes on for ever",
    "scancel 4711": "a cluster",
    "openv4 train run=pretrain_flash": "3 TB of memory",
    "openv4 train run=pretrain_pro": "19 TB of memory",
}


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of content
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    page: Path
    line: int
    text: str  # continuation lines joined, comment removed

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; a block that is not closed, or has no language though it is not output, fails."""
    language, start, content = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = re.match(r"\s*```+\s*([\w+-]*)\s*$", line)
        if fence and language is None:
            language, start, content = fence[1], number + 1, []
        elif fence:
            yield Block(page, start, language or "", "\n".join(content) + "\n")
            language = None
        else:
            content.append(line)
    assert language is None, f"{page}:{start}: a block that is not closed"


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a shell block."""
    pending, first = "", 0
    for number, line in enumerate(block.text.splitlines(), block.line):
        first = first if pending else number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        words = shlex.split(pending, comments=True)
        if words:
            yield Command(block.page, first, _without_comment(pending))
        pending = ""
    assert not pending, f"{block.where}: the last command goes on"


def _without_comment(line: str) -> str:
    """The line as typed, quotes kept, up to its comment."""
    words = shlex.split(line, comments=True)
    for match in re.finditer(r"\s+#", line):
        if shlex.split(line[: match.start()]) == words:
            return re.sub(r"\s+", " ", line[: match.start()]).strip()
    return re.sub(r"  +", " ", line).strip()


def commands(page: Path) -> list[Command]:
    return [
        command for block in blocks(page) if block.language in ("sh", "bash", "shell") for command in commands_of(block)
    ]


def listed(text: str, table: dict[str, str]) -> str | None:
    """The entry of a table that a command begins with, on whole words."""
    for entry in table:
        if text == entry or text.startswith(f"{entry} "):
            return entry
    return None


def prose(page: Path) -> str:
    """The page without its code blocks, lines kept."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = re.match(r"\s*```", line)
        inside ^= bool(fence)
        lines.append("" if fence or inside else line)
    return "\n".join(lines)


# How docs/finetune.md and README.md plan LoRA on Flash; to these the row's length is added.
LORA_PLAN = ("run=lora", "model=v4_flash", "gpus=8", "recompute=full")
LORA_ROWS = (8192, 12288, 16384)


def memory_table(plan: dict[str, Any]) -> str:
    """What `openv4 plan --json` says about the memory of its only stage, as a Markdown table."""
    (stage,) = plan["stages"]
    rows = [(item["name"], item["bytes"], item["how"]) for item in stage["memory"]]
    rows.append(("all", stage["bytes"], f"of {plan['cluster']['memory_gb']:g}"))
    lines = ["| memory of each GPU | GB | |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {size / 1e9:.2f} | {how} |" for name, size, how in rows)])


def row_table(plans: dict[int, dict[str, Any]]) -> str:
    """Memory against the length of a row."""
    lines = ["| rows of | GB of 80 | |", "|---|---|---|"]
    for row, plan in plans.items():
        lines.append(
            f"| {row:,} | {plan['stages'][0]['bytes'] / 1e9:.1f} | {'fits' if plan['fits'] else 'does not fit'} |"
        )
    return "\n".join(lines)


def stage_table(run: str) -> str:
    """The stages of a pretraining recipe as a Markdown table; in italics what its YAML marks as ours."""
    ours = _ours(run)
    stages = load_config([f"run={run}", "data.path=x"]).stages
    keys: tuple[tuple[str, str], ...] = (
        ("tokens", "tokens"),
        ("sequence_length", "row, tokens"),
        ("batch_tokens_start", "first batch, tokens"),
        ("batch_ramp_tokens", "batch grows over, tokens"),
        ("batch_tokens", "batch, tokens"),
        ("warmup_steps", "warm-up, steps"),
        ("lr", "learning rate"),
        ("lr_end", "at the end"),
        ("lr_shape", "shape"),
        ("attention", "attention"),
        ("indexer_weight", "indexer loss"),
        ("mtp_weight", "MTP loss"),
        ("balance_weight", "balance loss"),
        ("bias_speed", "bias speed"),
    )
    lines = [
        "| | " + " | ".join(f"`{stage.name}`" for stage in stages) + " |",
        "|---" * (len(stages) + 1) + "|",
    ]
    for key, title in keys:
        cells = []
        for index, stage in enumerate(stages):
            mark = ours[index].get(key)
            text = "" if mark is None else _shown(getattr(stage, key))
            cells.append(f"*{text}*" if mark else text)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _ours(run: str) -> list[dict[str, bool]]:
    """Per stage of a recipe, the keys that it sets, and whether a comment says "ours": on the line, or just above."""
    stages: list[dict[str, bool]] = []
    above = ""
    for line in (CONF / "run" / f"{run}.yaml").read_text().split("\nstages:\n")[1].splitlines():
        code, _, comment = line.partition("#")
        if line and not line.startswith(" "):
            break
        if not code.strip():
            above = f"{above} {comment}" if comment else ""
            continue
        key = code.strip().removeprefix("- ").partition(":")[0]
        if code.strip().startswith("- "):
            stages.append({})
        elif key != "name":
            stages[-1][key] = "ours:" in above or "ours:" in comment
        above = ""
    written = yaml.safe_load((CONF / "run" / f"{run}.yaml").read_text())["stages"]
    assert [set(stage) for stage in stages] == [set(stage) - {"name"} for stage in written]
    return stages
