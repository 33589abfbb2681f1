"""What a config says about data."""

import math
from dataclasses import dataclass
from typing import Literal

Effort = Literal["none", "high", "max"]  # no reasoning, reasoning, reasoning after the max-effort prefix


class DataError(ValueError):
    """The user's data or a prepared folder is not usable; one line says what, where, and the way out."""


@dataclass(frozen=True)
class SourceConfig:
    """A prepared folder, and its share of the rows relative to the other sources' weights."""

    path: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise DataError(f"weight={self.weight} of {self.path}: must be positive; leave the source out instead")
