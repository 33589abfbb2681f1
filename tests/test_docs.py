"""The documentation tells the truth: every command runs, every link leads somewhere, every name exists.

Commands run as they are printed, each page in a folder of its own and in the page's order. So that they take seconds,
training commands get overrides appended (`SHORT`; what whole runs do is tested elsewhere), and folders that the text
presupposes are small: `DeepSeek-V4-Flash` is a model of a million parameters in the format of the release.
"""

import ast
import dataclasses
import gzip
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import yaml
from cli_cases import Run
from doc_cases import (
    LORA_PLAN,
    LORA_ROWS,
    NOT_HERE,
    PAGES,
    ROOT,
    RUN_WHOLE_ELSEWHERE,
    blocks,
    commands,
    commands_of,
    listed,
    memory_table,
    prose,
    row_table,
    stage_table,
)

from openv4.data.prepare import CONVERSATIONS, KING_JAMES
from openv4.launch.cli import COMMANDS
from openv4.model.config import ModelConfig
from openv4.optim.schedule import Stage
from openv4.train.config import TrainConfig, load_config, presets_of

sys.path.append(str(ROOT / "docs" / "figures"))
import flow

BIN = Path(sys.executable).parent
SHORT = (
    "steps=2 threads=1 data.workers=0 validation.every=0 validation.byte_model_order=null logging.wandb=disabled "
    "logging.peak_tflops=1 logging.sample_tokens=4"
)
WATCHED = 8  # seconds that a command which goes on for ever is watched

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# Every command has its class.


@by_page
def test_every_command_has_its_class(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command.text)
        known = listed(command.text, RUN_WHOLE_ELSEWHERE) or listed(command.text, NOT_HERE)
        assert known or (words[0] == "openv4" and words[1] in (*COMMANDS, "--help")), (
            f"{command.where}: {command.text}: no class; see tests/doc_cases.py"
        )


def test_the_classes_hold_nothing_else() -> None:
    texts = [command.text for page in PAGES for command in commands(page)]
    for table in (RUN_WHOLE_ELSEWHERE, NOT_HERE):
        found = {listed(text, table) for text in texts}
        assert set(table) <= found, f"not in the documentation any more: {set(table) - found}"


@pytest.mark.parametrize("command", RUN_WHOLE_ELSEWHERE)
def test_what_runs_the_rest_exists(command: str) -> None:
    where = RUN_WHOLE_ELSEWHERE[command]
    if where == ".ci/run":
        run = {
            target for line in (ROOT / where).read_text().splitlines() for target in re.findall(r"make ([\w-]+)", line)
        }
        pending = list(run)
        while pending:  # and what those need
            recipe = re.search(rf"^{re.escape(pending.pop())}:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
            new = {word for word in (recipe[1].split() if recipe else []) if word.isidentifier()} - run
            run |= new
            pending += new
        target = command.removeprefix("make ")
        assert target in run or target == "setup", f"{where} does not run {command}"
    else:
        file, _, name = where.partition("::")
        assert not name or f"\ndef {name}(" in (ROOT / file).read_text()


@by_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose(page)) if span.startswith("make ")]
    for text in [*spans, *(command.text for command in commands(page) if command.text.startswith("make "))]:
        words = [word for word in text.split()[1:] if "=" not in word]
        assert set(words) <= targets, f"{page.name}: {text}"


# What cannot run here is configured, at least.


@pytest.mark.parametrize("recipe", [entry for entry in NOT_HERE if entry.startswith("openv4 train")])
def test_recipes_for_clusters_compose(recipe: str) -> None:
    for page in PAGES:
        for command in commands(page):
            if listed(command.text, {recipe: ""}):
                overrides = [re.sub(r"^data=.*", "data.path=x", word) for word in shlex.split(command.text)[2:]]
                assert load_config(overrides).name in recipe


# Blocks of other languages.


@by_page
def test_blocks_of_data_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("json", "jsonl"):
            try:
                json.loads(block.text)
            except ValueError:
                for line in block.text.splitlines():
                    json.loads(line)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        elif block.language == "python":
            ast.parse(block.text)
        else:
            assert block.language in ("sh", "make", "text", "bibtex", ""), f"{block.where}: {block.language}"


# Links and names.


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip())


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", ROOT / "docs" / "api" / "index.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_and_images_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


FOLDERS = "kernels|model|data|optim|train|launch|conf|docs|tests"


@by_page
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        match = re.fullmatch(rf"((?:{FOLDERS})/[\w./*-]+|[\w-]+\.(?:toml|txt|cff|md))(?:::(\w+))?", span)
        if match is None or not re.search(r"[.*/]$|\.", match[1]):  # else a metric, such as train/loss
            continue
        path, test = match[1].rstrip("/"), match[2]
        found = list(ROOT.glob(path)) or list((ROOT / "docs").glob(path))
        assert found, f"{page.name}: {span}"
        assert not test or f"def {test}(" in found[0].read_text(), f"{page.name}: {span}"


def schemas() -> dict[str, Any]:
    return {name: importlib.import_module(f"openv4.launch.{name}").CONFIG for name in COMMANDS}


def has_key(kind: Any, parts: list[str]) -> bool:
    """Whether a dataclass, or what is in it, has the key."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(has_key(option, parts) for option in get_args(kind))
    if not parts:
        return True
    if get_origin(kind) is tuple:
        return parts[0].isdigit() and has_key(get_args(kind)[0], parts[1:])
    return (
        dataclasses.is_dataclass(kind)
        and parts[0] in (hints := get_type_hints(kind))
        and has_key(hints[parts[0]], parts[1:])
    )


@by_page
def test_config_keys_that_are_named_exist(page: Path) -> None:
    kinds = schemas()
    groups = {group for name in kinds for group in presets_of(name)}
    first = {field.name for field in dataclasses.fields(TrainConfig)}
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        match = re.fullmatch(r"([a-z_]+(?:\.[a-z0-9_]+)*)(=\S*)?", span)
        if match is None or not (match[2] or ("." in span and span.split(".")[0] in first)):
            continue
        parts = match[1].split(".")
        module = ROOT.joinpath(*parts[:2]).with_suffix(".py")
        known = match[1] in groups or match[1] == "model.pretrained" or (not match[2] and module.is_file())
        file = bool(re.search(r"\.(py|md|json|jsonl|yaml|txt|toml|png|safetensors|npy)$", span))
        shorthand = has_key(ModelConfig, parts) or has_key(Stage, parts)
        found = shorthand or any(has_key(kind, parts) for kind in kinds.values())
        assert known or file or found, f"{page.name}: {span}"


# Tables and figures that are made from the project.


@pytest.mark.parametrize("run", ["pretrain_flash", "pretrain_pro"])
def test_the_table_of_stages_is_that_of_the_recipe(run: str) -> None:
    assert stage_table(run) in (ROOT / "docs" / "recipe.md").read_text(), (
        f"docs/recipe.md should hold\n{stage_table(run)}"
    )


def test_the_memory_of_lora_is_what_plan_says(openv4: Run) -> None:
    plans = {}
    for row in LORA_ROWS:
        result = openv4("plan", *LORA_PLAN, f"row_tokens={row}", "--json")
        assert result.code == 0, result.err
        plans[row] = json.loads(result.out)
    page = (ROOT / "docs" / "finetune.md").read_text()
    for table in (memory_table(plans[LORA_ROWS[0]]), row_table(plans)):
        assert table in page, f"docs/finetune.md should hold\n{table}"
    size = plans[LORA_ROWS[0]]["stages"][0]["bytes"] / 1e9
    line = f"rows of {LORA_ROWS[0]:,} tokens | | {size:.1f} GB each | calculated"
    assert line in (ROOT / "README.md").read_text(), f"README.md should say: {line}"


def test_the_drawing_of_the_imports_is_that_of_the_code() -> None:
    imports = flow.read_imports()
    assert set(flow.WAY) <= imports.keys()
    text = flow.as_text(imports)
    assert (ROOT / "docs" / "results" / "imports.txt").read_text() == text, "the imports changed: run make figures"
    drawing = (ROOT / "docs" / "results" / "imports.svg").read_text()
    assert hashlib.sha256(text.encode()).hexdigest() in drawing, "the imports changed: run make figures"


def test_the_drawing_leaves_out_what_other_imports_imply() -> None:
    imports = {"launch/a": ["model/c", "train/b"], "model/c": [], "train/b": ["model/c"]}
    assert flow.reduced(imports) == [("launch/a", "train/b"), ("train/b", "model/c")]


# And now run it all.


def console(text: str, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        ["bash", "-c", text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    endless = "--watch" in text
    try:
        output, _ = process.communicate(timeout=WATCHED if endless else 300)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert endless, f"{text}: does not end\n{output}"
    assert "Traceback" not in output, f"{text}\n{output}"
    assert process.returncode == 0 or (endless and process.returncode in (130, -signal.SIGINT)), f"{text}\n{output}"


def shortened(text: str, data: Path) -> str:
    """A command, and what makes it quick."""
    words = shlex.split(text)
    if words[:2] != ["openv4", "train"] or any(word.startswith("-") for word in words):
        return text
    extra = [SHORT]
    if not any(word.startswith(("data=", "data.path=", "data.sources=")) for word in words):
        extra.append(f"data={data}")
    if any("DeepSeek-V4-Flash" in word for word in words):  # as long as the stand-in's longest row
        extra.append("stages.0.sequence_length=1024 stages.0.batch_tokens=2048 micro_batch_tokens=2048")
    return " ".join([text, *extra])


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documentation presupposes."""
    folder = tmp_path_factory.mktemp("documentation")
    (folder / "data").mkdir()
    (folder / "data" / "corpus").symlink_to(KING_JAMES.parent)
    texts = folder / "my_texts"
    texts.mkdir()
    with gzip.open(KING_JAMES, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % 24 == 0:
                (texts / f"{number:04}.txt").write_text(json.loads(line)["text"], encoding="utf-8")
    with gzip.open(CONVERSATIONS.with_name("restyled.jsonl.gz"), "rt", encoding="utf-8") as file:
        (folder / "chat.jsonl").write_text("".join(line for line, _ in zip(file, range(80), strict=False)))
    console("openv4 prepare input=my_texts output=prepared", folder)
    dry = ["make", "--no-print-directory", "-n", "-o", ".venv/.runtime", "tiny-v4"]
    recipe = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in recipe.replace("\\\n", "").splitlines():
        console(shortened(re.sub(r"^\S*/openv4", "openv4", line), folder / "prepared"), folder)
    assert (folder / "runs" / "tiny_v4" / "config.json").is_file()
    (folder / "DeepSeek-V4-Flash").symlink_to("runs/tiny_v4")
    console(shortened("openv4 train run=smoke model=nano", folder / "prepared"), folder)
    for name in "abc":
        shutil.copytree(folder / "runs" / "smoke", folder / "runs" / name)
    return folder


@pytest.fixture
def work(bench: Path, tmp_path: Path) -> Path:
    """A copy of it for a page."""
    return shutil.copytree(bench, tmp_path / "work", symlinks=True)


def has_something_to_run(page: Path) -> bool:
    python = any(block.language == "python" for block in blocks(page))
    return python or any(not listed(c.text, RUN_WHOLE_ELSEWHERE | NOT_HERE) for c in commands(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if has_something_to_run(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_runs(page: Path, work: Path, bench: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            (work / "block.py").write_text(block.text)
            console(f"{sys.executable} block.py", work)
        if block.language != "sh":
            continue
        for command in commands_of(block):
            if not listed(command.text, RUN_WHOLE_ELSEWHERE | NOT_HERE):
                console(shortened(command.text, bench / "prepared"), work)
