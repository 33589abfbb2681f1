"""An n-gram model of bytes: the bits per byte that counting alone reaches, a bar for a small trained model."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


class _Level(NamedTuple):
    """Counts after contexts of one length; an n-gram is coded as an integer in base 256, its last byte lowest."""

    grams: _Ints  # [G] sorted codes of context and byte
    kept: _Floats  # [G] discounted count over the context's total
    contexts: _Ints  # [C] sorted codes
    left: _Floats  # [C] share of the probability that goes to the shorter context


class ByteModel:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1999) over bytes, contexts of 0 to `order` bytes.

    The longest context uses counts; a shorter one uses how many different bytes precede it, and the empty one is
    mixed with the uniform distribution over 256 bytes. On the King James text it beats Witten-Bell and plain absolute
    discounting at every order from 2. A text begins after `order` zero bytes, and texts do not see each other.
    """

    def __init__(self, order: int, levels: list[_Level]) -> None:
        self.order = order
        self._levels = levels

    @classmethod
    def fit(cls, texts: Iterable[bytes], order: int = 3) -> "ByteModel":
        """Count `texts`. Needs about 100 bytes of memory per byte of text while it runs.

        Raises:
            ValueError: `order` is not between 0 and 6, or there is no text.
        """
        if not 0 <= order <= 6:
            raise ValueError(f"order={order}: must be between 0 and 6 (an n-gram is coded in 64 bits)")
        codes = _grams(texts, order)
        if not len(codes):
            raise ValueError("no text to fit: give at least one byte")
        grams, counts = np.unique(codes, return_counts=True)
        levels = []
        for length in range(order, -1, -1):
            levels.append(_level(grams, counts))
            # Of every gram, the different bytes before it: one for each distinct gram that is a byte longer.
            grams, counts = np.unique(grams & ((1 << 8 * length) - 1), return_counts=True)
        return cls(order, levels[::-1])

    def bits_per_byte(self, texts: Iterable[bytes]) -> float:
        """Mean of -log2 p(byte | the bytes before) over all bytes of `texts`; NaN for no bytes."""
        grams, counts = np.unique(_grams(texts, self.order), return_counts=True)
        return float(-np.average(np.log2(self._probability(grams)), weights=counts)) if len(grams) else float("nan")

    def probabilities(self, context: bytes) -> _Floats:
        """Distribution of the byte after `context`: `[256]` float64. A short context is padded with zero bytes."""
        code = int.from_bytes(context[max(0, len(context) - self.order) :]) if self.order else 0
        return self._probability((code << 8) + np.arange(256))

    def _probability(self, grams: _Ints) -> _Floats:
        probability = np.full(len(grams), 1 / 256)
        for length, level in enumerate(self._levels):
            short = grams & ((1 << 8 * (length + 1)) - 1)
            kept = _look_up(level.grams, level.kept, short, 0.0)
            left = _look_up(level.contexts, level.left, short >> 8, 1.0)
            probability = kept + left * probability
        return probability


def _grams(texts: Iterable[bytes], order: int) -> _Ints:
    """The code of each byte with the `order` bytes before it, over all texts `[bytes]`."""
    codes = []
    for text in texts:
        padded = np.frombuffer(bytes(order) + text, dtype=np.uint8)
        code = np.zeros(len(text), dtype=np.int64)
        for at in range(order + 1):
            code = (code << 8) | padded[at : at + len(text)]
        codes.append(code)
    return np.concatenate(codes) if codes else np.zeros(0, dtype=np.int64)


def _level(grams: _Ints, counts: _Ints) -> _Level:
    """Chen and Goodman's three discounts: for grams seen once, twice, and more often."""
    seen = [max(1, int(np.count_nonzero(counts == times))) for times in range(1, 5)]
    scale = seen[0] / (seen[0] + 2 * seen[1])
    discounts = [times - (times + 1) * scale * seen[times] / seen[times - 1] for times in (1, 2, 3)]
    # A handful of grams may ask for less than nothing or for more than there is.
    table = np.array([0.0, *(min(max(discount, 0.1), 0.9 * times) for times, discount in enumerate(discounts, 1))])
    discount = table[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> 8, return_index=True)
    total = np.add.reduceat(counts, first)
    return _Level(
        grams=grams,
        kept=(counts - discount) / np.repeat(total, np.diff([*first, len(grams)])),
        contexts=contexts,
        left=np.add.reduceat(discount, first) / total,
    )


def _look_up(keys: _Ints, values: _Floats, wanted: _Ints, otherwise: float) -> _Floats:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], otherwise)
