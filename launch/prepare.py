"""``openv4 prepare``: text files to token shards."""

import shlex
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..data.prepare import PrepareConfig, prepare

CONFIG = PrepareConfig


def run(config: PrepareConfig) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    start = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("reading", total=None)
        manifest = prepare(
            config, lambda done, total: bar.update(task, description="encoding", completed=done, total=total)
        )
    for name, split in manifest.splits.items():
        console.print(
            f"{name:>12}: {split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text"
        )
    if manifest.skipped:
        console.print(f"{'skipped':>12}: {manifest.skipped:,} empty documents")
    console.print(f"{'tokenizer':>12}: {manifest.vocab_size:,} entries")
    console.print(f"{'written':>12}: {Path(config.output)} in {time.monotonic() - start:.1f} s")
    console.print(f"    try next: openv4 train run=smoke data={shlex.quote(config.output)}")
