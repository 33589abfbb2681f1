"""The prepared folders of a run, opened and checked against its model."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.config import DataError
from ..data.loader import Loader
from ..data.packing import pack
from ..data.prepare import KING_JAMES, ensure_prepared, ensure_prepared_chat
from ..data.shards import PreparedData, ShardStore
from ..model.config import ModelConfig
from .checkpoint import find_tokenizer, latest_checkpoint
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

    def rows(self, row_length: int) -> int:
        """Rows of ``row_length`` that the training documents fill, packed."""
        stores = [folder.split("train") for folder in self.folders]
        return sum(pack(store.length(np.arange(store.documents)), row_length).rows for store in stores)

    def token_bytes(self, device: torch.device) -> Tensor:
        """UTF-8 bytes of each token id, ``[V]`` int64; 0 for special tokens."""
        return torch.tensor(self.folders[0].token_bytes, dtype=torch.long, device=device)

    def loader(self, seed: int, workers: int) -> Loader:
        stores = [folder.split("train") for folder in self.folders]
        return Loader(stores, self.weights, seed, workers, pad_id=self.eos)


def open_dataset(
    config: DataConfig,
    output: Path,
    model: ModelConfig,
    pretrained: str | None = None,
    longest: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Opens what ``config`` names; the shipped text, or a file of conversations, is prepared below ``output`` first.

    Args:
        pretrained: folder whose tokenizer and chat templates encode the conversations.
        longest: tokens that a conversation may have; None: any number.

    Raises:
        DataError: damaged or missing folders, sources of different tokenizers, token ids beyond ``model.vocab_size``,
            begin and end tokens that the model knows by other ids.
    """
    paths = [Path(path) for path in ([config.path] if config.path else [s.path for s in config.sources])]
    if config.path and Path(config.path).is_file():
        if pretrained is None:
            raise DataError(
                f"data.path={config.path} is a file: give model.pretrained=<folder>, whose tokenizer encodes it, or "
                f"prepare it first with `openv4 prepare input={config.path} output=<folder>`"
            )
        paths = [_conversations(config, Path(config.path), output, pretrained, longest)]
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
        tokens = max((s.longest for s in folder.manifest.splits.values() if s.trained is not None), default=0)
        if longest is not None and tokens > longest:
            raise DataError(
                f"{folder.folder}: its longest conversation has {tokens} tokens, a row {longest}; raise "
                f"stages.N.sequence_length, or prepare with max_tokens={longest} too_long=drop"
            )
        if folder.manifest.tokenizer.sha256 != folders[0].manifest.tokenizer.sha256:
            raise DataError(
                f"{folder.folder} and {folders[0].folder} have different tokenizers; prepare both with the same one"
            )
    return Dataset(folders, tuple(source.weight for source in config.sources) or (1.0,))


def _conversations(config: DataConfig, path: Path, output: Path, pretrained: str, longest: int | None) -> Path:
    """The folder that holds the conversations of a file, prepared for the pretrained model."""
    folder, tokenizer = output / "data", find_tokenizer(pretrained) or Path(pretrained)
    settings = (path, folder, tokenizer, config.effort, config.chat_templates, longest)
    prepared = folder.exists()
    try:
        return ensure_prepared_chat(*settings)
    except DataError:
        if not prepared or latest_checkpoint(output / "checkpoints") is not None:
            raise
        shutil.rmtree(folder)  # of a run that ended before it had trained anything; its settings have changed since
        return ensure_prepared_chat(*settings)
