"""Draws docs/results/imports.svg: the package's modules, which imports which, and the way of the data through them.

`make figures` runs it. Everything but the numbers of the way is read from the import statements; imports.txt lists
them, and a test compares it with the code.
"""

import ast
import hashlib
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

# Folders in columns, each importing only from columns to its left, and their colours.
COLUMNS = (("kernels",), ("model", "optim", "data"), ("train",), ("launch",))
COLORS = {
    "kernels": "#8a5a00",
    "data": "#00695c",
    "model": "#1a4fa0",
    "optim": "#8e2a6b",
    "train": "#9a2c1c",
    "launch": "#4a4a4a",
}
# From text to a released model.
WAY = (
    "data/prepare",
    "data/packing",
    "data/loader",
    "train/loop",
    "model/transformer",
    "model/attention",
    "kernels/attention",
    "model/loss",
    "optim/groups",
    "train/checkpoint",
    "model/released",
    "launch/export",
)


def read_imports(root: Path = ROOT) -> dict[str, list[str]]:
    """For every module, as folder/name, the modules of ours that it imports, wherever the statement stands."""
    folders = [folder for column in COLUMNS for folder in column]
    files = {
        f"{path.parent.name}/{path.stem}": path for folder in folders for path in (root / folder).glob("[a-z]*.py")
    }
    found: dict[str, list[str]] = {}
    for name, path in sorted(files.items()):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                package = [path.parent.name] if node.level == 1 else []
                target = [*package, *(node.module.split(".") if node.module else [])]
                imported |= {"/".join(target), *("/".join([*target, alias.name]) for alias in node.names)}
        found[name] = sorted(imported & files.keys())
    return found


def as_text(imports: dict[str, list[str]]) -> str:
    return "".join(f"{name}: {' '.join(imported) or '-'}\n" for name, imported in imports.items())


def reduced(imports: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The imports from folder to folder that no other path of imports implies, and those on the way of the data."""

    def reach(name: str, seen: set[str]) -> set[str]:
        for imported in imports[name]:
            if imported not in seen:
                seen.add(imported)
                reach(imported, seen)
        return seen

    edges = []
    for name, imported in imports.items():
        implied = {target for other in imported for target in reach(other, set())}
        for target in imported:
            on_way = name in WAY and target in WAY
            if folder(target) != folder(name) and (on_way or target not in implied):
                edges.append((name, target))
    return edges


def folder(module: str) -> str:
    return module.partition("/")[0]


def rows_of(names: list[str], edges: list[tuple[str, str]], height: dict[str, float]) -> list[str]:
    """Modules of a folder beside what they import: fewer crossings."""

    def mean(name: str) -> float:
        heights = [height[target] for source, target in edges if source == name and target in height]
        return sum(heights) / len(heights) if heights else float("inf")

    return sorted(names, key=lambda name: (mean(name), name))


def draw(imports: dict[str, list[str]]) -> None:
    edges = reduced(imports)
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "openv4", "font.family": "DejaVu Sans Mono"}
    figure, axes = plt.subplots(figsize=(11, 8.4))
    width, gap, line = 2.0, 1.3, 1.0
    left: dict[str, float] = {}
    right: dict[str, float] = {}
    height: dict[str, float] = {}
    tallest = max(sum(sum(folder(name) == part for name in imports) + 2.2 for part in column) for column in COLUMNS)
    for index, column in enumerate(COLUMNS):
        x = index * (width + gap)
        total = sum(sum(folder(name) == part for name in imports) + 2.2 for part in column)
        y = (tallest - total) * (0.3 if index == 0 else 0.5)
        for part in column:
            names = rows_of([name for name in imports if folder(name) == part], edges, height)
            box = FancyBboxPatch(
                (x, y + 0.1),
                width,
                len(names) * line + 1.5,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor="white",
                edgecolor=COLORS[part],
                linewidth=1.3,
                zorder=2,
            )
            axes.add_patch(box)
            axes.text(
                x + 0.12, y + 0.72, f"{part}/", weight="bold", size=10.5, color=COLORS[part], va="center", zorder=3
            )
            for row, name in enumerate(names):
                at = y + 1.6 + row * line
                height[name], left[name], right[name] = at, x, x + width
                on_way = name in WAY
                axes.text(
                    x + 0.12,
                    at,
                    name.partition("/")[2],
                    size=8.5,
                    va="center",
                    weight="bold" if on_way else "normal",
                    color="black" if on_way else "#444444",
                    zorder=3,
                )
                if on_way:
                    axes.text(
                        x + width - 0.2,
                        at,
                        str(WAY.index(name) + 1),
                        size=7.5,
                        va="center",
                        ha="center",
                        weight="bold",
                        color="white",
                        zorder=4,
                        bbox={"boxstyle": "circle,pad=0.18", "facecolor": COLORS[part], "edgecolor": "none"},
                    )
            y += len(names) * line + 2.2
    for source, target in edges:
        start, end = (right[target], height[target]), (left[source], height[source])
        reach = (end[0] - start[0]) * 0.5
        points = [start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end]
        curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
        strong = source in WAY and target in WAY
        axes.add_patch(
            PathPatch(
                curve,
                facecolor="none",
                edgecolor=COLORS[folder(target)],
                alpha=0.95 if strong else 0.4,
                linewidth=1.8 if strong else 0.8,
                zorder=1,
            )
        )
    axes.set_xlim(-0.1, len(COLUMNS) * (width + gap) - gap + 0.1)
    axes.set_ylim(tallest, -0.3)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    digest = hashlib.sha256(as_text(imports).encode()).hexdigest()
    figure.savefig(RESULTS / "imports.svg", metadata={"Date": None, "Description": digest}, facecolor="white")


if __name__ == "__main__":
    modules = read_imports()
    (RESULTS / "imports.txt").write_text(as_text(modules))
    draw(modules)
