"""Arithmetic that goes wrong in silence: is what processes hold alike still alike, and does a step repeated give the
same bits?

A process whose memory or arithmetic has failed goes on with wrong numbers, and no error tells of it. Two checks find
it out (`stability.check_every`, `stability.replay_every`): weights that several processes hold are compared by
fingerprints, and the first micro-batch of a step is computed twice. Neither leaves a trace in the run.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.transformer import Transformer
from .config import IntegrityError, StabilityConfig
from .parallel import Alone
from .preflight import host_name

# Numbers that are multiplied at once: what a fingerprint needs of memory, eight bytes each, whatever the tensor.
CHUNK = 2**18
_SHOWN = 3


class IntegrityChecks:
    """Both checks of a run. All processes call `before_step` with each step.

    Weights are compared right before the update. Each is updated by its owner alone, who sends it to all others
    (`optim/exchange.py`): after that a wrong bit is either gone or everywhere. So a comparison finds what has happened
    to trained weights since the update before, and to all else, frozen weights and router biases, at any time.

    Args:
        tell: is given the kind and text of an event.
    """

    def __init__(
        self, config: StabilityConfig, model: Transformer, processes: Alone, tell: Callable[[str, str], None]
    ) -> None:
        self.config, self.model, self.processes, self.tell = config, model, processes, tell
        self._alike: int | None = None  # the step of the last comparison that found no difference

    def before_step(self, step: int, loss: Callable[[], Tensor]) -> None:
        """Does what is due in the step that follows `step` others; the first one of a process compares in any case.

        Args:
            loss: runs the model forward on the step's first micro-batch.

        Raises:
            IntegrityError: a repetition gives another result each time. Where weights differ, the update of the step
                raises it. Always in all processes, with the same text.
        """
        every, again = self.config.check_every, self.config.replay_every
        due = every and self.processes.world > 1 and (self._alike is None or step % every == 0)
        self.processes.before_update = functools.partial(self._compare, step) if due else None
        if again and step % again == 0:
            self._replay(step, loss)

    @torch.no_grad()
    def _compare(self, step: int) -> None:
        """Two numbers of each process, of dense tensors and of experts; one for every tensor only if these differ."""
        found = {name: fingerprint(tensor) for name, tensor in self.processes.copies(self.model)}
        kinds = [[h for name, h in found.items() if _is_expert(name) is expert] for expert in (False, True)]
        short = [int(fingerprint(torch.stack(kind))) if kind else 0 for kind in kinds]
        names, expert = ["dense", "a.experts.b"], self.processes.expert
        if disagreement(names, self.processes.everywhere(short), expert):
            reports = self.processes.everywhere([int(h) for h in found.values()])
            who = disagreement(list(found), reports, expert, self.processes.everywhere(host_name()))
            raise IntegrityError(f"step {step}: {who}; {self._way_out()}")
        self._alike = step

    def _way_out(self) -> str:
        if self._alike is None:
            return "so it was when this process started; run the same command again, on other machines if it comes back"
        return (
            f"at step {self._alike} all were alike, so a later checkpoint may hold the fault; remove those, and run "
            "the same command on other machines"
        )

    def _replay(self, step: int, loss: Callable[[], Tensor]) -> None:
        results = [self._result(loss), self._result(loss)]
        if not self.processes.any(results[0] != results[1]):
            return
        results.append(self._result(loss))  # by all: tokens may travel between them
        counts = self.processes.everywhere(len(set(results)))
        hosts = self.processes.everywhere(host_name())
        persistent = max(counts) == len(results)
        who = _ranks([rank for rank, count in enumerate(counts) if count == max(counts)], hosts)
        text = f"{who} computed the same forward and backward pass three times, "
        text += "with three results" if persistent else "once with another result"
        if self.processes.expert * self.processes.context > 1:
            text += " (of processes that send each other tokens all differ where one is at fault)"
        if persistent:
            since = "" if self._alike is None else f"weights were alike at step {self._alike}; "
            way_out = "run the same command on other machines, it resumes from the last checkpoint"
            raise IntegrityError(f"step {step}: {text}; {since}{way_out}")
        if self.processes.first:
            self.tell("integrity", f"before step {step + 1}, {text}; the run goes on")

    def _result(self, loss: Callable[[], Tensor]) -> tuple[int, ...]:
        """Fingerprints of loss and gradients. `torch.autograd.grad` gives these to nobody else: it calls no hook that
        waits for a parameter's gradient, neither of `optim/exchange.py` nor of DeepSpeed."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        device = trained[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws the same each time
            value = loss()
            gradients = torch.autograd.grad(value, trained, allow_unused=True)
        added = [parameter.grad for parameter in trained]  # by Transformer Engine, which does so itself
        for parameter in trained:
            parameter.grad = None
        found = [value.detach(), *(g for g in (*gradients, *added) if g is not None)]
        return tuple(torch.stack([fingerprint(tensor) for tensor in found]).tolist())


def fingerprint(tensor: Tensor) -> Tensor:
    """A number, 0-dim int64, that tells the bits of a tensor of any dtype from others.

    Four bytes at a time are a number, which is multiplied, modulo 2^64, by an odd number that belongs to its place; the
    fingerprint is the sum. Odd numbers have an inverse modulo 2^64, so where one number of four bytes differs, in
    whatever bits, the sum does. Where several differ it stays the same by chance, once in 2^33 or less often.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    factors = _factors(raw.device)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for part in raw.split(4 * CHUNK):
        if len(part) % 4:
            part = F.pad(part, (0, -len(part) % 4))
        elif part.storage_offset() % 4:
            part = part.clone()
        numbers = part.view(torch.int32)
        total = total * _NEXT + (numbers * factors[: len(numbers)]).sum()
    return total


_NEXT = 0x2545F4914F6CDD1D  # odd: of each part, so that all have other factors


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd numbers ``[CHUNK]``, those of Vigna's splitmix64 with the last bit set; int64, which wraps around."""
    z = torch.arange(1, CHUNK + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        z = (z ^ (z >> shift & 2 ** (64 - shift) - 1)) * factor
    return (z | 1).to(device)


def disagreement(
    names: Sequence[str], reports: Sequence[Sequence[int]], expert: int, hosts: Sequence[str] | None = None
) -> str:
    """Who holds what the others do not, and in which tensors; nothing if all agree.

    Args:
        reports: of each rank, a fingerprint for each of the names.
        expert: every so many ranks hold the same experts; all else all hold.
    """
    everybody = range(len(reports))
    wrong: list[str] = []
    outvoted: set[int] = set()
    divided: set[int] = set()
    for index, name in enumerate(names):
        step = expert if _is_expert(name) else 1
        for ranks in (everybody[first::step] for first in range(step)):
            (value, most), *others = Counter(reports[rank][index] for rank in ranks).most_common()
            if others:
                wrong += [name] * (name not in wrong[-1:])
                if 2 * most > len(ranks):
                    outvoted.update(rank for rank in ranks if reports[rank][index] != value)
                else:
                    divided.update(ranks)
    if not wrong:
        return ""
    known = hosts or [""] * len(reports)
    told = []
    if outvoted:
        verb = "holds" if len(outvoted) == 1 else "hold"
        told.append(f"{_ranks(sorted(outvoted), known)} {verb} other weights than most")
    if divided:
        told.append(f"{_ranks(sorted(divided), known)} hold different weights, and no majority tells which are right")
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"{'; '.join(told)}: {', '.join(wrong[:_SHOWN])}{more}"


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """``rank 1 (host a)`` or ``ranks 1 (host a) and 3 (host b)``."""
    *rest, last = [f"{rank} (host {hosts[rank]})" for rank in ranks]
    return f"ranks {', '.join(rest)} and {last}" if rest else f"rank {last}"
