"""Who may import whom: kernels | data < model | optim < train < launch, read from the imports themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "data", "model", "optim", "train", "launch")

ALLOWED = {
    "kernels": set(),
    "data": set(),
    "model": {"kernels"},
    "optim": {"kernels"},
    "train": {"model", "data", "optim", "kernels"},
    "launch": {"train", "model", "data", "optim", "kernels"},
}

# What only some folders may use. kernels: torch and triton alone; model: one device, no process group.
FORBIDDEN = {
    "kernels": {"numpy", "hydra", "omegaconf", "safetensors", "deepspeed", "wandb"},
    "model": {"hydra", "omegaconf", "yaml", "deepspeed", "wandb", "torch.distributed"},
    "optim": {"hydra", "omegaconf", "yaml", "deepspeed", "wandb"},
    "data": {"hydra", "omegaconf", "deepspeed", "wandb"},
}

MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_import_order(path: Path) -> None:
    folder = path.parent.name
    for level, module in imports(path):
        if level == 2:
            assert module.split(".")[0] in ALLOWED[folder], f"{folder} must not import {module}"
        elif level == 0:
            assert not module.startswith("openv4"), f"{path}: import our own modules relatively"
            for name in FORBIDDEN.get(folder, ()):
                assert module != name and not module.startswith(f"{name}."), f"{folder} must not import {module}"


def test_only_train_config_reads_conf() -> None:
    for path in MODULES:
        if path != ROOT / "train" / "config.py":
            assert '"conf"' not in path.read_text(), f"{path}: conf/ is read by train/config.py only"


@pytest.mark.parametrize("folder", ["", "kernels"])
def test_these_packages_hold_a_docstring_only(folder: str) -> None:
    """transformers and peft look for a package named `kernels`; from the repository's root they would find ours."""
    (statement,) = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)


def test_nothing_unpickles() -> None:
    for path in MODULES:
        text = path.read_text()
        assert "torch.load" not in text and "import pickle" not in text and "allow_pickle=True" not in text


def test_tests_are_flat() -> None:
    assert not list((ROOT / "tests").glob("*/"))[1:] and not (ROOT / "tests" / "__init__.py").exists()
