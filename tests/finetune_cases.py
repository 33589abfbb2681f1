"""A small release with a chat tokenizer, conversations for it, and runs of a second: for the tests of fine-tuning."""

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import release_fixture as oracle
from chat_cases import chat_tokenizer
from cli_cases import WORDS

from openv4.train.config import TrainConfig, load_config

# HCA, CSA and window layers, hash and learned routing, an MTP block; FP4 experts are whole groups of 32.
SIZES: dict[str, Any] = oracle.RAGGED | {
    "vocab_size": 352,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "compress_ratios": [16, 4, 0, 0],
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "index_topk": 4,
    "num_hash_layers": 1,
    "sliding_window": 8,
    "hc_sinkhorn_iters": 3,
    "rope_scaling": None,
    "max_position_embeddings": 512,
}
# Rows of 128 tokens, two a step in two micro-batches.
QUICK = [
    "precision.compute=fp32",
    "recompute=none",
    "stages.0.sequence_length=128",
    "stages.0.batch_tokens=256",
    "stages.0.lr=1e-2",
    "stages.0.lr_end=1e-3",
    "stages.0.warmup_steps=0",
    "micro_batch_tokens=128",
    "threads=1",
    "data.workers=0",
    "validation.every=0",
    "logging.wandb=disabled",
    "logging.peak_tflops=1",
]


# Matrices whose scales are larger than the rule of recipe 8.1 makes them: only who keeps them gives the bits back.
SLACK = ("layers.1.attn.indexer.wq_b", "mtp.0.attn.wq_b", "mtp.0.ffn.experts.1.w3")


def write_base(folder: Path, variant: str = "instruct", seed: int = 0, **changes: Any) -> Path:
    """A release of random weights, with files beside them as released."""
    sizes = SIZES | changes
    tensors = oracle.random_tensors(sizes, variant, seed, wild=False)
    for name in SLACK:
        if stored := tensors.get(f"{name}.weight"):
            # Without its highest bit a code is of one half of a group's range or less.
            mask = 0xBB if stored.dtype == "I8" else 0xBF
            tensors[f"{name}.weight"] = replace(stored, data=bytes(byte & mask for byte in stored.data))
    oracle.write_folder(folder, oracle.config_json(sizes, variant), tensors)
    chat_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "mine": true}')
    (folder / "generation_config.json").write_text('{"temperature": 1.0}')
    (folder / "LICENSE").write_text("MIT")
    return folder


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short questions and answers."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 6)))

    return [
        {
            "messages": [
                {"role": "user", "content": f"{index} {text()}?"},
                {"role": "assistant", "content": f"{text()}."},
            ]
        }
        for index in range(count)
    ]


def write_chat(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def quick_config(run: str, base: Path, chat: Path, output: Path, *overrides: str) -> TrainConfig:
    given = [f"run={run}", f"model.pretrained={base}", f"data.path={chat}", f"output={output}"]
    return load_config([*given, *QUICK, *overrides])


def scales_of(stored: oracle.Stored) -> oracle.Values:
    raw = oracle.array(stored)
    return oracle.e8m0(raw) if stored.dtype == "F8_E8M0" else raw.astype(np.float64)


def assert_quantised(
    name: str, exact: oracle.Values, after: Mapping[str, oracle.Stored], before: Mapping[str, oracle.Stored]
) -> None:
    """The nearest codes of ``exact``; each block by the rule of recipe 8.1, or with the scale that it had, whichever is
    nearer."""
    stored, scale = after[name], after[oracle.scale_of(name)]
    block, quantise = ((1, 32), oracle.quantise_fp4) if stored.dtype == "I8" else ((128, 128), oracle.quantise_fp8)

    def errors(scales: oracle.Values) -> oracle.Values:
        codes = quantise(exact, scales)[0]
        decoded = oracle.E2M1[codes] if stored.dtype == "I8" else oracle.e4m3(codes)
        off = decoded * oracle.spread(scales, exact.shape, block) - exact
        rows, columns = range(0, exact.shape[0], block[0]), range(0, exact.shape[1], block[1])
        return np.array([[np.square(off[r : r + block[0], c : c + block[1]]).sum() for c in columns] for r in rows])

    found, rule = scales_of(scale), quantise(exact)[1]
    if before[name].dtype == stored.dtype:
        kept = scales_of(before[oracle.scale_of(name)])
        assert ((found == kept) | (found == rule)).all(), name
        # Of sums in float32 over up to 128 x 128 numbers.
        assert (errors(found) <= np.minimum(errors(kept), errors(rule)) * (1 + 1e-4)).all(), name
    else:
        assert (found == rule).all(), name
    codes = quantise(exact, found)[0]
    assert stored.data == (oracle.pack(codes) if stored.dtype == "I8" else codes).tobytes(), name
