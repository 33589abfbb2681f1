"""`openv4 merge`: adapters folded into released weights, in every format; what is not adapted keeps its bits."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import release_fixture as oracle
import torch
from cli_cases import Run, console, spoil, untouched
from finetune_cases import assert_quantised, write_base
from lora_cases import randomise, tokens_for
from model_cases import relative_rms
from run_cases import contents
from torch import Tensor

from openv4.model import Transformer, load_pretrained
from openv4.model.config import LoRAConfig
from openv4.model.lora import add_lora, lora_parameters, save_adapter
from openv4.model.released import released_tensors
from openv4.train.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("one_thread", "elsewhere")

LORA = LoRAConfig(rank=3, alpha=4.5, targets=("attention", "shared_experts", "experts", "compressor"))
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}


def make_adapter(base: Path, folder: Path, factor: float = 1.0, lora: LoRAConfig = LORA) -> Transformer:
    """Random adapters that act, saved to ``folder``; the model with them, float32."""
    model = load_pretrained(base, torch.float32)
    add_lora(model, lora)
    randomise(model)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith(".B"):
                parameter *= factor
    save_adapter(model, lora, folder, str(base))
    return model.eval()


@pytest.fixture(scope="module")
def adapted(release: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer]:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return folder, make_adapter(release, folder)


def deltas(model: Transformer) -> dict[str, Tensor]:
    """What each released matrix gains, by plain products of the factors."""
    found: dict[str, Tensor] = {}
    factors = {name: p.detach() for name, p in lora_parameters(model).items()}
    for name in [name for name in factors if name.endswith(".A")]:
        delta = factors[name[:-1] + "B"] @ factors[name] * 1.5
        owner, _, leaf = name.removesuffix(".A").partition(".lora")
        if not leaf:
            found[f"{owner}.weight"] = delta
            continue
        parts = {"w1": delta[:, :32], "w3": delta[:, 32:]} if leaf == ".gate_up" else {"w2": delta}
        found |= {f"{owner}.{e}.{w}.weight": rows for w, stack in parts.items() for e, rows in enumerate(stack)}
    return found


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "fp4+fp8", None])
def test_merged(
    format: str | None, adapted: tuple[Path, Transformer], release: Path, openv4: Run, tmp_path: Path
) -> None:
    """Each tensor is the sum of base and delta, formed in float32 and rounded once, as the format says (recipe 8.1)."""
    folder, model = adapted
    output = tmp_path / "deep" / "out"
    result = openv4("merge", f"adapter={folder}", f"output={output}", *([f"format={format}"] if format else []))
    assert (result.code, result.err) == (0, "")
    kind = format or "fp4+fp8"
    assert f"{folder} merged into {release}, written to {output} as {kind}" in result.out
    before, after = oracle.read_release(release), oracle.read_release(output)
    values, gained = oracle.values(before), deltas(model)
    assert len(gained) == 3 * 5 + 3 * 3 + 3 * 12 + 4
    for name, value in values.items():
        stored, scale = after[name], oracle.scale_of(name)
        if name not in gained:
            if kind == "fp4+fp8":
                assert (stored, after.get(scale)) == (before[name], before.get(scale)), name
            continue
        total = torch.from_numpy(value).float() + gained[name]
        if stored.dtype in ("F32", "BF16"):
            exact = total if stored.dtype == "F32" else total.bfloat16()
            assert stored.data == exact.view(torch.uint8).numpy().tobytes(), name
            continue
        assert after[scale].dtype == ("F8_E8M0" if kind == "fp4+fp8" else "F32")
        assert_quantised(name, total.double().numpy(), after, before)
    experts = {after[name].dtype for name in gained if ".experts." in name}
    assert experts == {DTYPES.get(kind, "I8")}

    merged = load_pretrained(output, torch.float32)
    tokens = tokens_for(model.config, 0, 96)
    with torch.no_grad():
        error = relative_rms(merged(tokens), model(tokens))
        base = relative_rms(load_pretrained(release, torch.float32)(tokens), model(tokens))
    # float32: a rounding of 6e-8 for each weight and another order of sums. The others round weights to 8, 4 and 2
    # bits, and a token may choose another expert; what is learned is much larger.
    assert base > 0.5
    assert error < {"fp32": 1e-5, "bf16": 0.05, "fp8": 0.25, "fp4+fp8": 0.5}[kind]
    files = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    assert all((output / file).read_bytes() == (release / file).read_bytes() for file in files)
    assert not list(tmp_path.rglob(".*"))


def report(out: str) -> dict[str, tuple[float, float]]:
    """Cosine and norm ratio by kind of tensor, from the table."""
    rows = re.findall(r"^\W*([a-z][\w.]+) +\W +([\d.]+) +\W +([\d.]+) *\W*$", out, re.MULTILINE)
    return {kind: (float(cosine), float(ratio)) for kind, cosine, ratio in rows}


KINDS = {
    *(f"layers.attn.{name}" for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "compressor.wkv", "compressor.wgate")),
    *(f"layers.ffn.{who}.w{n}" for who in ("experts", "shared_experts") for n in (1, 2, 3)),
}


def test_the_report(adapted: tuple[Path, Transformer], release: Path, openv4: Run, tmp_path: Path) -> None:
    """Against cosine and ratio of all matrices of a kind, from the files."""
    folder, model = adapted
    result = openv4("merge", f"adapter={folder}", f"output={tmp_path / 'out'}")
    found = report(result.out)
    assert found.keys() == KINDS and "warning" not in result.out
    before, after = (oracle.values(oracle.read_release(path)) for path in (release, tmp_path / "out"))
    for kind, (cosine, ratio) in found.items():
        pattern = re.escape(kind).replace("layers", r"layers\.\d+").replace("ffn\\.experts", r"ffn\.experts\.\d+")
        names = [name for name in deltas(model) if re.fullmatch(rf"{pattern}\.weight", name)]
        assert names, kind
        wanted = torch.cat([deltas(model)[name].double().flatten() for name in names])
        stored = torch.cat([torch.from_numpy(after[name] - before[name]).flatten() for name in names])
        assert cosine == pytest.approx(float(wanted @ stored / wanted.norm() / stored.norm()), abs=1e-4), kind
        assert ratio == pytest.approx(float(stored.norm() / wanted.norm()), abs=1e-4), kind
    exact = report(openv4("merge", f"adapter={folder}", f"output={tmp_path / 'fp32'}", "format=fp32").out)
    assert exact == dict.fromkeys(KINDS, (1.0, 1.0))


def test_a_delta_that_is_lost_is_told(openv4: Run, tmp_path: Path) -> None:
    """On a base in FP8, whose steps are a sixteenth of a weight: a tiny one vanishes, and bfloat16 is the way out."""
    base = write_base(tmp_path / "base", "base")
    # In float32 the sum itself keeps some three digits of it.
    make_adapter(base, tmp_path / "tiny", 1e-5, LoRAConfig(rank=3, targets=("wq_a", "experts")))
    result = openv4("merge", f"adapter={tmp_path / 'tiny'}", f"output={tmp_path / 'fp8'}")
    assert result.code == 0
    warning = result.out[result.out.index("warning: rounding to fp8 loses most of what was learned in ") :]
    assert "layers.attn.wq_a" in warning and "choose format=bf16, or serve base and adapter side by side" in warning
    assert all(cosine < 0.9 or not 0.5 < ratio < 2 for cosine, ratio in report(result.out).values())
    result = openv4("merge", f"adapter={tmp_path / 'tiny'}", f"output={tmp_path / 'fp32'}", "format=fp32")
    assert "warning" not in result.out
    make_adapter(base, tmp_path / "none", 0.0, LoRAConfig(rank=3, targets=("wq_a", "experts")))
    result = openv4("merge", f"adapter={tmp_path / 'none'}", f"output={tmp_path / 'same'}")
    assert "warning" not in result.out and set(report(result.out).values()) == {(1.0, 1.0)}
    before, after = (oracle.values(oracle.read_release(path)) for path in (base, tmp_path / "same"))
    assert all((after[name] == value).all() for name, value in before.items()), "nothing learned, nothing changed"


def test_the_base_by_name(
    adapted: tuple[Path, Transformer], release: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    """An adapter that was moved to another machine names a folder that is not there."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapted[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    merge = ["merge", f"adapter={folder}"]
    for name in ("/not/here", "", None):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        message = refused(*merge, f"output={tmp_path / 'out'}")
        assert f"{folder / 'adapter_config.json'}: its base model {name!r} is not here" in message
    assert not (tmp_path / "out").exists()
    assert console(*merge, f"output={tmp_path / 'out'}", f"base={release}") == 0
    assert console("merge", f"adapter={adapted[0]}", f"output={tmp_path / 'other'}") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_shards_and_copies(release: Path, tmp_path: Path) -> None:
    """Several files with an index; the MTP block's own embedding, which some releases store, is stored again."""
    tensors = oracle.read_release(release)
    tensors |= {copy: tensors[original] for copy, original in oracle.COPIES.items()}
    base = tmp_path / "base"
    oracle.write_folder(base, json.loads((release / "config.json").read_text()), tensors, shards=2)
    make_adapter(base, tmp_path / "adapter", lora=LoRAConfig(rank=2, targets=("wkv",)))
    output = tmp_path / "out"
    assert console("merge", f"adapter={tmp_path / 'adapter'}", f"output={output}", "max_shard_gb=1e-4") == 0
    assert len(list(output.glob("*.safetensors"))) > 3
    after = oracle.read_release(output)
    assert after.keys() == tensors.keys()
    changed = {name for name in after if after[name] != tensors[name]}
    assert {name.rpartition(".")[0] for name in changed} == {f"layers.{layer}.attn.wkv" for layer in range(3)}
    load_pretrained(output)


def test_export_points_to_merge(adapted: tuple[Path, Transformer], refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("export", f"checkpoint={adapted[0]}", f"output={tmp_path / 'out'}")
    assert f"use openv4 merge adapter={adapted[0]} output={tmp_path / 'out'}" in message
    assert not (tmp_path / "out").exists()
    tokens = tokens_for(adapted[1].config, 0)
    assert relative_rms(load_model(adapted[0])(tokens), adapted[1](tokens)) < 1e-6


@pytest.mark.parametrize("case", ["other sizes", "fewer experts", "cut", "no weights", "no config", "no adapter"])
def test_adapters_that_do_not_fit(
    case: str, adapted: tuple[Path, Transformer], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapted[0], folder)
    extra: list[str] = []
    if case == "other sizes":
        extra, words = [f"base={write_base(tmp_path / 'base', q_lora_rank=64)}"], "misshapen: base_model.model."
    elif case == "fewer experts":
        extra, words = [f"base={write_base(tmp_path / 'base', n_routed_experts=3)}"], "misshapen"
    elif case == "cut":
        spoil(folder / "adapter_model.safetensors", "cut")
        words = "adapter_model.safetensors: damaged or unreadable"
    elif case == "no weights":
        spoil(folder / "adapter_model.safetensors", "gone")
        words = "adapter_model.safetensors: damaged or unreadable"
    elif case == "no config":
        spoil(folder / "adapter_config.json", "gone")
        words = "holds neither config.json nor adapter_config.json"
    else:
        folder = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        words = "adapter_config.json"
    with untouched(tmp_path):
        message = refused("merge", f"adapter={folder}", f"output={tmp_path / 'out'}", *extra)
    assert words in message


def test_outputs_that_are_in_use(
    adapted: tuple[Path, Transformer], refused: Callable[..., str], release: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with untouched(tmp_path, release):
        for output in (tmp_path / "mine", release):
            message = refused("merge", f"adapter={adapted[0]}", f"output={output}")
            assert message.startswith(f"{output}: already there and not empty")
    for override, words in (
        ("format=fp4", "format='fp4'"),
        ("max_shard_gb=0", "max_shard_gb=0.0 must be positive"),
        ("adaptor=x", "adaptor: unknown key; did you mean adapter?"),
    ):
        assert refused("merge", f"adapter={adapted[0]}", f"output={tmp_path / 'out'}", override).startswith(words)
    assert refused("merge", f"output={tmp_path / 'out'}").startswith("adapter is not set; give adapter=")
    names = {name for name, _ in released_tensors(adapted[1])}
    assert not any(".lora." in name for name in names)
