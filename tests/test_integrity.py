"""Fingerprints of weights, processes that hold other ones than the rest, and steps that come out another way."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integrity_cases import UNTOUCHED, flip
from process_cases import run_processes
from run_cases import OVERRIDES, STEPS, contents, rows, tiny_config
from torch import Tensor, nn

from openv4.train import loop
from openv4.train.config import IntegrityError, StabilityConfig
from openv4.train.integrity import CHUNK, IntegrityChecks, disagreement, fingerprint
from openv4.train.loop import train
from openv4.train.metrics import read_lines
from openv4.train.parallel import Alone

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("integrity")]

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool, torch.float64)


# Fingerprints.


def by_hand(data: bytes) -> int:
    """Of at most one part, in Python's integers."""

    def odd(index: int) -> int:
        z = index * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return (z ^ z >> 31) | 1

    data += bytes(-len(data) % 4)
    numbers = [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]
    total = sum(number * odd(index) for index, number in enumerate(numbers, 1)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 4), (17,)], ids=str)
def test_every_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    tensor = raw.view(dtype).view(shape)
    known = int(fingerprint(tensor))
    assert known == by_hand(bytes(raw.tolist()))
    found = {known}
    for byte in range(count):
        for bit in range(1 if dtype is torch.bool else 8):
            raw[byte] ^= 1 << bit
            found.add(int(fingerprint(tensor)))
            raw[byte] ^= 1 << bit
    assert len(found) == 1 + count * (1 if dtype is torch.bool else 8)


@pytest.mark.parametrize("skipped", [0, 1, 4])
def test_bits_of_long_tensors_count_in_every_part(skipped: int) -> None:
    """Also where a view begins between two numbers of four bytes."""
    generator = torch.Generator().manual_seed(skipped)
    whole = torch.randint(0, 256, (8 * CHUNK + 21,), dtype=torch.uint8, generator=generator)
    tensor = whole[skipped:]
    found = {int(fingerprint(tensor))}
    places = [0, 4 * CHUNK - 1, 4 * CHUNK, 8 * CHUNK, len(tensor) - 1]
    for place in [*places, *torch.randint(0, len(tensor), (20,), generator=generator).tolist()]:
        tensor[place] ^= 64
        found.add(int(fingerprint(tensor)))
    tensor[:4], tensor[4 * CHUNK : 4 * CHUNK + 4] = tensor[4 * CHUNK : 4 * CHUNK + 4].clone(), tensor[:4].clone()
    found.add(int(fingerprint(tensor)))  # the same numbers in other places
    assert len(found) == 27


def test_a_view_has_the_fingerprint_of_what_it_shows() -> None:
    x = torch.randn(6, 10)
    assert fingerprint(x.mT) == fingerprint(x.mT.contiguous()) != fingerprint(x)
    assert fingerprint(x[:, 1:]) == fingerprint(x[:, 1:].clone())
    assert fingerprint(torch.tensor(0.0)) != fingerprint(torch.tensor(-0.0))
    assert fingerprint(torch.empty(0)) == 0


# Who differs.


@pytest.mark.parametrize(
    ("reports", "expert", "wanted"),
    [
        ([[1, 2], [1, 2]], 1, ""),
        ([[1, 2], [3, 2]], 1, "ranks 0 (host a) and 1 (host b) hold different weights, and no majority tells which"),
        ([[1, 2], [1, 2], [1, 3]], 1, "rank 2 (host c) holds other weights than most: l.0.ffn.experts.w1"),
        (
            [[1, 2], [4, 2], [1, 3], [1, 2]],
            1,
            "ranks 1 (host b) and 2 (host c) hold other weights than most: embed, l.",
        ),
        ([[1, 2], [2, 2], [1, 2], [2, 2]], 1, "ranks 0 (host a), 1 (host b), 2 (host c) and 3 (host d) hold different"),
        ([[1, 2], [1, 3], [1, 2], [1, 3]], 2, ""),  # other experts
        ([[1, 2], [1, 3], [1, 2], [1, 4]], 2, "ranks 1 (host b) and 3 (host d) hold different weights"),
        ([[1, 2], [1, 3], [1, 4], [1, 5]], 4, ""),  # every expert in one process
        ([[1, 2], [1, 2], [1, 2], [1, 2], [1, 2], [1, 9]], 2, "rank 5 (host f) holds other weights than most"),
    ],
)
def test_the_minority_is_named(reports: list[list[int]], expert: int, wanted: str) -> None:
    text = disagreement(["embed", "l.0.ffn.experts.w1"], reports, expert, "abcdef")
    assert text.startswith(wanted) and bool(text) == bool(wanted)


def test_of_many_tensors_a_few_are_named() -> None:
    text = disagreement([f"t{i}" for i in range(9)], [list(range(9)), list(range(9)), list(range(1, 10))], 1, "abc")
    assert text == "rank 2 (host c) holds other weights than most: t0, t1, t2 and 6 more"


class Threads(Alone):
    """A process that is a thread among others."""

    def __init__(self, rank: int, world: int, expert: int, shared: dict[str, Any]) -> None:
        self.rank, self.world, self.expert, self._shared = rank, world, expert, shared

    def everywhere(self, value: Any) -> list[Any]:
        self._shared["values"][self.rank] = value
        self._shared["barrier"].wait(20)
        values = list(self._shared["values"])
        self._shared["barrier"].wait(20)
        return values


def in_threads(world: int, expert: int, act: Callable[[Threads], str]) -> list[str]:
    shared = {"values": [None] * world, "barrier": threading.Barrier(world)}
    said = [""] * world

    def work(rank: int) -> None:
        said[rank] = act(Threads(rank, world, expert, shared))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def update(checks: IntegrityChecks, step: int) -> None:
    checks.before_step(step, torch.Tensor)
    if checks.processes.before_update is not None:
        checks.processes.before_update()


class Small(nn.Module):
    """Something dense, a buffer, and experts, of which every second rank has the same."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.arange(100.0))
        self.register_buffer("bias", torch.ones(5))
        self.ffn = nn.Module()
        self.ffn.experts = nn.ParameterDict({"w1": nn.Parameter(torch.full((2, 3, 4), float(place)))})


@pytest.mark.parametrize(
    ("world", "expert", "rank", "name", "wanted"),
    [
        (3, 1, 2, "dense", "rank 2 (host x) holds other weights than most: dense"),
        (4, 2, 1, "bias", "rank 1 (host x) holds other weights than most: bias"),
        (4, 2, 3, "ffn.experts.w1", "ranks 1 (host x) and 3 (host x) hold different weights"),
        (6, 2, 4, "ffn.experts.w1", "rank 4 (host x) holds other weights than most: ffn.experts.w1"),
        (4, 4, 3, "ffn.experts.w1", ""),
    ],
)
def test_a_flipped_bit_is_found_at_the_interval(
    world: int, expert: int, rank: int, name: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "x")

    def act(process: Threads) -> str:
        model = Small(process.rank % expert)
        checks = IntegrityChecks(StabilityConfig(check_every=3), model, process, print)
        for step in range(5, 12):
            try:
                update(checks, step)
            except IntegrityError as error:
                return str(error)
            if process.rank == rank and step == 7:
                flip(dict([*model.named_parameters(), *model.named_buffers()])[name], 2, 31)
        return ""

    said = in_threads(world, expert, act)
    assert len(set(said)) == 1
    if not wanted:
        assert said[0] == ""
        return
    assert said[0].startswith(f"step 9: {wanted}")
    assert "at step 6 all were alike, so a later checkpoint may hold the fault; remove those" in said[0]


def test_weights_that_differ_from_the_start() -> None:
    """A process compares before its first step, at whatever step the run stands."""

    def act(process: Threads) -> str:
        checks = IntegrityChecks(StabilityConfig(check_every=100), Small(process.rank), process, print)
        with pytest.raises(IntegrityError) as error:
            update(checks, 17)
        return str(error.value)

    assert "so it was when this process started; run the same command again" in in_threads(2, 1, act)[0]


# Real processes.


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_processes("integrity_cases:run_all", 2, environment={"SLURMD_NODENAME": "x"})


def test_a_repetition_leaves_no_trace(found: list[dict[str, Any]]) -> None:
    """Losses, gradients at their owners, loads, weights, bit for bit; the bytes of tokens alone have been sent."""
    counted = {"sent.tokens", "sent.results"}
    for rank in found:
        assert set(rank["untouched"]) == {case.name for case in UNTOUCHED}
        for case in UNTOUCHED:
            assert set(rank["untouched"][case.name]) == (counted if case.expert > 1 else set()), case.name


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("weight", "layers.0.attn.wq_a.weight"),
        ("bf16 weight", "layers.0.attn.wq_a.weight"),
        ("bias", "layers.0.ffn.gate.bias"),
    ],
)
def test_a_flipped_bit_is_found_by_both(case: str, tensor: str, found: list[dict[str, Any]]) -> None:
    first, second = (rank[case] for rank in found)
    assert first == second
    assert first.startswith("step 4: ranks 0 (host x) and 1 (host x) hold different weights, and no majority tells")
    assert "at step 2 all were alike" in first
    assert f"are right: {tensor}; at step" in first


def test_of_an_expert_that_one_process_holds_there_is_nothing_to_compare(found: list[dict[str, Any]]) -> None:
    assert [rank["expert"] for rank in found] == ["", ""]


def test_what_the_update_sends_anew_is_not_found_after_it(found: list[dict[str, Any]]) -> None:
    """The owner of a weight sends all of it: then a wrong bit is gone, or everywhere."""
    assert [rank["sent again"] for rank in found] == ["", ""]


@pytest.mark.parametrize("case", ["transient", "late"])
def test_a_transient_fault_is_told_and_named(case: str, found: list[dict[str, Any]]) -> None:
    (error, told), (other, nothing) = (rank[case] for rank in found)
    assert (error, other, nothing) == ("", "", [])
    assert [kind for kind, _ in told] == ["integrity"]
    assert "before step 1, rank 1 (host x) computed the same forward and backward pass three times" in told[0][1]


def test_a_persistent_fault_stops_all(found: list[dict[str, Any]]) -> None:
    (error, told), (other, also) = (rank["persistent"] for rank in found)
    assert error == other and told == also == []
    assert error.startswith("step 0: rank 1 (host x) computed the same forward and backward pass three times, with t")
    assert error.endswith("run the same command on other machines, it resumes from the last checkpoint")


def test_processes_that_share_tokens_are_named_together(found: list[dict[str, Any]]) -> None:
    (error, _), (other, _) = (rank["shared"] for rank in found)
    assert error == other
    assert "ranks 0 (host x) and 1 (host x) computed" in error and "(of processes that send each other tokens" in error


def test_a_repetition_drops_the_same_elements_and_gives_random_numbers_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    checks = IntegrityChecks(StabilityConfig(replay_every=1), model, Alone(), print)
    state, drawn = torch.get_rng_state(), []

    def loss() -> Tensor:
        drawn.append(float(torch.rand(())))
        return model(torch.ones(4, 8)).sum()  # type: ignore[no-any-return]

    checks.before_step(0, loss)
    assert drawn[0] == drawn[1] and len(drawn) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# Whole runs.


@pytest.fixture(scope="module")
def plain(small_data: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return train(tiny_config(small_data, tmp_path_factory.mktemp("plain") / "run"))


def replayed(small_data: Path, output: Path) -> Any:
    config = tiny_config(small_data, output)
    return replace(config, stability=replace(config.stability, replay_every=1))


def assert_same(run: Path, plain: Path) -> None:
    ours, theirs = (contents(path / "checkpoints" / f"step_{STEPS}") for path in (run, plain))
    assert ours == theirs
    assert rows(run) == rows(plain)


def test_a_run_with_repetitions_is_that_without(small_data: Path, plain: Path, tmp_path: Path) -> None:
    assert_same(train(replayed(small_data, tmp_path / "run")), plain)


def wrong_passes(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], bool]) -> list[int]:
    """Passes of repetitions; those that `wrong` names are off by a rounding, each by another amount."""
    right, passes = loop.loss_alone, [0]

    def loss(*arguments: Any) -> Tensor:
        passes[0] += 1
        return right(*arguments) * (1 + 2e-7 * passes[0] * wrong(passes[0]))

    monkeypatch.setattr(loop, "loss_alone", loss)
    return passes


def test_a_run_goes_on_after_a_transient_fault(
    small_data: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = wrong_passes(monkeypatch, lambda number: number == 5)
    run = train(replayed(small_data, tmp_path / "run"))
    assert passes == [2 * STEPS + 1]
    assert_same(run, plain)
    (event,) = [event for event in read_lines(run / "events.jsonl") if event["kind"] == "integrity"]
    assert event["step"] == 2 and "before step 3, rank 0" in event["text"]


def test_a_persistent_fault_ends_a_run_in_one_line(
    small_data: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_passes(monkeypatch, lambda number: number > 4)
    run = tmp_path / "run"
    line = refused("train", *OVERRIDES, f"data={small_data}", f"output={run}", "stability.replay_every=2")
    assert line.startswith("step 4: rank 0 (host ") and "with three results" in line
    assert read_lines(run / "events.jsonl")[-1]["kind"] == "failed"
