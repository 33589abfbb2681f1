"""``openv4 inspect``: what a folder of weights holds, from its headers alone."""

from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ..model.accounting import parameter_table
from ..model.released import COMPANIONS, Release, released_tensors
from ..model.shapes import Format
from ..model.transformer import Transformer
from ..train.checkpoint import find_weights

VARIANTS: dict[Format, str] = {
    "fp4+fp8": "instruct layout: FP4 routed experts, FP8 matrices",
    "fp8": "Base layout: FP8 matrices, routed experts included",
    "bf16": "not quantised, bfloat16",
    "fp32": "not quantised, float32",
}


@dataclass(frozen=True)
class InspectConfig:
    """Attributes:
    path: a folder of weights, a run or one of its checkpoints.
    """

    path: str


CONFIG = InspectConfig
POSITIONAL = "path"


def run(config: InspectConfig) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    release = Release(find_weights(config.path))
    with torch.device("meta"):
        model = Transformer(release.config)
    size = sum(entry.bytes for entry in release.entries.values())
    files = len({entry.file for entry in release.entries.values()})
    rows = {
        "folder": str(release.folder),
        "variant": VARIANTS[release.format],
        **dict(parameter_table(release.config)),
        "MTP block": "yes" if release.config.num_nextn_predict_layers else "no",
        "stored": f"{len(release.entries):,} tensors in {files} files, {size:,} bytes",
        "beside": ", ".join(name for name in COMPANIONS if (release.folder / name).is_file()) or "nothing",
    }
    for label, text in rows.items():
        console.print(f"{label:>12}: {text}")
    table = Table("type", "tensors", "bytes")
    count = Counter(entry.dtype for entry in release.entries.values())
    for dtype, tensors in count.most_common():
        held = sum(entry.bytes for entry in release.entries.values() if entry.dtype == dtype)
        table.add_row(dtype, f"{tensors:,}", f"{held:,}")
    console.print(table)
    for kind, names in release.problems(dict(released_tensors(model))).items():
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        console.print(f"{kind:>12}: {', '.join(names[:20]) or 'none'}{more}")
