"""``openv4 prepare``: text or chat files to token shards."""

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
        trained = "" if split.trained is None else f" ({split.trained:,} trained)"
        what = "documents" if split.trained is None else "conversations"
        console.print(
            f"{name:>12}: {split.tokens:,} tokens{trained}, {split.documents:,} {what}, {split.bytes:,} bytes of text, "
            f"longest {split.longest:,} tokens"
        )
    if manifest.skipped:
        what = "empty documents" if config.kind == "text" else f"conversations of more than {config.max_tokens} tokens"
        console.print(f"{'skipped':>12}: {manifest.skipped:,} {what}")
    console.print(f"{'tokenizer':>12}: {manifest.vocab_size:,} entries")
    console.print(f"{'written':>12}: {Path(config.output)} in {time.monotonic() - start:.1f} s")
    recipe = "smoke" if config.kind == "text" else "finetune model.pretrained=<folder>"
    console.print(f"    try next: openv4 train run={recipe} data={shlex.quote(config.output)}")
