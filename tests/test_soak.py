"""The soak (`soak.py`) in small: thirty kills, and that it notices what it is there to notice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from soak import report
from soak_cases import FAULTS, KILLS

pytestmark = pytest.mark.xdist_group("soak")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the soaks of `soak_cases` have left their tallies. They fork, which a process with threads must not."""
    folder = tmp_path_factory.mktemp("soak")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(Path(__file__).with_name("soak_cases.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def tally(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def test_thirty_kills_change_nothing(folder: Path) -> None:
    """Every checkpoint loads, no sample is lost or repeated, no bit differs."""
    found = tally(folder, "healthy")
    assert found["problems"] == []
    assert sum(found["kills"].values()) >= KILLS == 30
    assert found["kills"]["saving"] and len(found["kills"]) >= 2
    assert found["runs"] >= 2 and found["checkpoints"] >= 20 and found["samples"] >= 200


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed(fault: Any, folder: Path) -> None:
    found = tally(folder, fault.__name__)
    assert [name for name in FAULTS[fault] if not found[name]] == [], found["problems"]


def test_the_published_report_is_that_of_the_published_numbers() -> None:
    results = Path(__file__).parents[1] / "docs" / "results"
    published = json.loads((results / "soak.json").read_text())
    assert published["problems"] == []
    assert (results / "soak.md").read_text() == report(published)
