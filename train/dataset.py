"""The prepared folders of a run, opened and checked against its model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.loader import Loader
from ..data.prepare import KING_JAMES, ensure_prepared
from ..data.shards import DataError, PreparedData, ShardStore
from ..model.config import ModelConfig
from .config import DataConfig


@dataclass(frozen=True)
class Dataset:
    """One or more prepared folders that share a tokenizer."""

    folders: tuple[PreparedData, ...]
    weights: tuple[float, ...]

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any source."""
        return "+".join(folder.fingerprint for folder in self.folders)

    @property
    def eos(self) -> int:
        return self.folders[0].eos

    @property
    def tokenizer_path(self) -> Path:
        return self.folders[0].tokenizer_path

    @property
    def validation(self) -> list[ShardStore]:
        """Validation splits that hold anything."""
        return [store for folder in self.folders if (store := folder.split("validation")).documents]

    def token_bytes(self, device: torch.device) -> Tensor:
        """UTF-8 bytes of each token id, ``[V]`` int64; 0 for special tokens."""
        return torch.tensor(self.folders[0].token_bytes, dtype=torch.long, device=device)

    def loader(self, seed: int, workers: int) -> Loader:
        stores = [folder.split("train") for folder in self.folders]
        return Loader(stores, self.weights, seed, workers, pad_id=self.eos)


def open_dataset(
    config: DataConfig, output: Path, model: ModelConfig, progress: Callable[[int, int], None] | None = None
) -> Dataset:
    """Opens what ``config`` names; the shipped text is prepared below ``output`` first.

    Raises:
        DataError: damaged or missing folders, sources of different tokenizers, token ids beyond ``model.vocab_size``,
            begin and end tokens that the model knows by other ids.
    """
    paths = [Path(path) for path in ([config.path] if config.path else [s.path for s in config.sources])]
    if not paths:
        paths = [ensure_prepared(KING_JAMES, output / "data", config.vocab_size, config.join_bytes, progress)]
    folders = tuple(PreparedData(path, config.verify) for path in paths)
    for folder in folders:
        if folder.vocab_size > model.vocab_size:
            raise DataError(
                f"{folder.folder}: token ids reach {folder.vocab_size - 1}, but model.vocab_size={model.vocab_size}; "
                f"set model.vocab_size={folder.vocab_size} or prepare with a smaller tokenizer"
            )
        if (folder.bos, folder.eos) != (model.bos_token_id, model.eos_token_id):
            raise DataError(
                f"{folder.folder}: documents begin with token {folder.bos} and end with {folder.eos}; set "
                f"model.bos_token_id={folder.bos} model.eos_token_id={folder.eos}"
            )
        if folder.manifest.tokenizer.sha256 != folders[0].manifest.tokenizer.sha256:
            raise DataError(
                f"{folder.folder} and {folders[0].folder} have different tokenizers; prepare both with the same one"
            )
    return Dataset(folders, tuple(source.weight for source in config.sources) or (1.0,))
