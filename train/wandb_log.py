"""Weights & Biases: a run's rows in groups over its tokens, its config and code version, its summary."""

import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metrics import GROUPS, Row
from .secret import redacted


class WandbLog:
    """Weights & Biases, the same run on every resume. What fails there is reported once and never stops training."""

    def __init__(self, mode: str, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._step = -1  # the last one that W&B has been told
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if mode == "disabled":
            return
        with self._guarded():
            import wandb

            id_file = folder / "wandb_run_id"
            if not id_file.exists():
                id_file.write_text(secrets.token_hex(4))
            self._run = wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=project,
                name=name,
                id=id_file.read_text().strip(),
                resume="allow" if mode == "online" else None,
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off", init_timeout=60),
            )
            # W&B makes a section of every prefix.
            self._run.define_metric("tokens")
            for group in GROUPS:
                self._run.define_metric(f"{group}/*", step_metric="tokens")
            for key in ("train/loss", "validation/loss", "validation/bits_per_byte"):
                self._run.define_metric(key, step_metric="tokens", summary="min,last")
            for file in ("config.yaml", "env.json"):
                if (folder / file).exists():  # a copy below the run's own files, where W&B keeps a config.yaml itself
                    copy = Path(self._run.dir) / "openv4" / file
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(folder / file, copy)
                    self._run.save(str(copy), base_path=self._run.dir, policy="now")

    def write(self, row: Row) -> None:
        if self._run is not None:
            # W&B takes no step twice: after a rollback rows are numbered on, and only their tokens go back.
            self._step = max(self._step + 1, int(row["step"]))
            with self._guarded():
                self._run.log({k: v for k, v in row.items() if k != "step"}, step=self._step)

    def image(self, key: str, path: Path) -> None:
        if self._run is not None:
            with self._guarded():
                import wandb

                self._run.log({key: wandb.Image(str(path))})

    def conclude(self, summary: Mapping[str, Any], plot: Path) -> None:
        """The end: the loss plot, and the summary as W&B's own and as a table of one row, to compare runs by."""
        self.image("plots/loss", plot)
        if self._run is not None:
            with self._guarded():
                import wandb

                self._run.log({"summary": wandb.Table(columns=list(summary), data=[list(summary.values())])})
                self._run.summary.update({f"final/{key}": value for key, value in summary.items()})

    def finish(self) -> None:
        if self._run is not None:
            with self._guarded():
                self._run.finish()

    def _guarded(self) -> "_Guard":
        return _Guard(self)

    def disable(self, error: BaseException) -> None:
        self._run = None
        reason = redacted(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"W&B stopped ({reason}); training goes on without it", file=sys.stderr)


class _Guard:
    def __init__(self, log: WandbLog) -> None:
        self._log = log

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):  # the one place where anything is caught: a monitor must not stop its subject
            self._log.disable(error)
            return True
        return False
