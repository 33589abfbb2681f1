"""The architecture's numbers: read from a preset or from a released ``config.json``, checked once, never changed."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

AttentionKind = Literal["swa", "csa", "hca"]
# What CSA layers attend to: every visible entry; the same, while the indexer alone learns; the indexer's choice.
AttentionMode = Literal["dense", "indexer_warmup", "sparse"]
# What a block computes again in its backward pass instead of keeping it.
Recompute = Literal["none", "selective", "full"]

# transformers' names of the three attention kinds
LAYER_TYPES: dict[str, AttentionKind] = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


# What LoRA may adapt: parts of a layer, and a name for several of them. `model.lora` knows their matrices.
_LORA_GROUPS = {"attention": ("wq_a", "wq_b", "wkv", "wo_a", "wo_b")}
LORA_TARGETS = (*_LORA_GROUPS, *_LORA_GROUPS["attention"], "shared_experts", "experts", "compressor", "indexer")
# What PEFT adapts as a parameter; it refuses dropout there.
PEFT_PARAMETERS = ("wo_a", "experts")


class ModelConfigError(ValueError):
    """A model configuration that cannot be built; the message names the key, the value and the way out."""


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message names the file or tensors and the way out."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN of the compressed layers' rotary embedding (recipe 2.1); no attention scaling goes with it."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self, "model.rope_scaling.")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a DeepSeek-V4 model, under the key names of the released ``config.json``.

    Defaults that are not sizes are those of DeepSeek-V4-Flash (recipe 1).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]  # one per layer, then one per MTP block: 0 = window only
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    # Attention kind of each layer in transformers' names; empty: ratio 0 is a window, 4 is CSA, any other is HCA.
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 128
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: int = 1048576
    bos_token_id: int = 0
    eos_token_id: int = 1
    # The released config says 0.02, V3's report 0.006; the true value is not published (recipe 1).
    initializer_range: float = 0.006
    # Static mHC biases are not published (recipe 4). "zero" starts with streams averaged at every site, "identity"
    # with each stream kept to itself.
    hc_init: Literal["zero", "identity"] = "zero"
    # "none" gives what mHC constrains, plain hyper-connections: for comparison, and not to be exported (recipe 13).
    hc_constraint: Literal["sinkhorn", "none"] = "sinkhorn"

    def __post_init__(self) -> None:
        _check_numbers(self, "model.")
        for ratio in self.compress_ratios:
            self._require(type(ratio) is int and ratio >= 0, "compress_ratios", "must be whole numbers, 0 or more")
        blocks = self.num_hidden_layers + self.num_nextn_predict_layers
        ratios, types = self.compress_ratios, self.layer_types
        if len(ratios) == self.num_hidden_layers:  # an MTP block is window-only unless said otherwise
            object.__setattr__(self, "compress_ratios", (*ratios, *(0,) * self.num_nextn_predict_layers))
        elif len(ratios) != blocks:
            raise ModelConfigError(
                f"model.compress_ratios has {len(ratios)} entries; give one for each of the {self.num_hidden_layers} "
                f"layers and of the {self.num_nextn_predict_layers} MTP blocks"
            )
        if types and len(types) == self.num_hidden_layers:
            object.__setattr__(self, "layer_types", (*types, *("sliding_attention",) * self.num_nextn_predict_layers))
        for layer, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise ModelConfigError(f"model.layer_types[{layer}]={kind!r}: choose from {', '.join(LAYER_TYPES)}")
            if (LAYER_TYPES[kind] == "swa") != (self.compress_ratios[layer] == 0):
                raise ModelConfigError(
                    f"model.layer_types[{layer}]={kind!r} does not go with compress_ratios[{layer}]="
                    f"{self.compress_ratios[layer]}: 0 is for sliding_attention, and only for it"
                )
        for key in ("bos_token_id", "eos_token_id"):
            self._require(getattr(self, key) < self.vocab_size, key, f"is beyond vocab_size={self.vocab_size}")
        self._require(self.num_attention_heads % self.o_groups == 0, "o_groups", "must divide num_attention_heads")
        self._require(self.num_experts_per_tok <= self.n_routed_experts, "num_experts_per_tok", "exceeds the experts")
        self._require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even")
        self._require(self.qk_rope_head_dim <= self.head_dim, "qk_rope_head_dim", "exceeds head_dim")
        if "csa" in self.kinds:
            self._require(self.qk_rope_head_dim <= self.index_head_dim, "index_head_dim", "is below qk_rope_head_dim")
        self._require(self.n_shared_experts == 1, "n_shared_experts", "must be 1, as in every V4")
        self._require(self.num_nextn_predict_layers <= 1, "num_nextn_predict_layers", "must be 0 or 1")
        self._require(self.hc_init in ("zero", "identity"), "hc_init", "must be zero or identity")
        self._require(self.hc_constraint in ("sinkhorn", "none"), "hc_constraint", "must be sinkhorn or none")
        free = self.hc_constraint == "none" and self.hc_init != "zero"
        self._require(not free, "hc_init", "is for hc_constraint=sinkhorn; leave one of the two out")

    def _require(self, holds: bool, key: str, why: str) -> None:
        if not holds:
            raise ModelConfigError(f"model.{key}={getattr(self, key)} {why}")

    @property
    def kinds(self) -> tuple[AttentionKind, ...]:
        """Attention kind of each block, MTP block last."""
        if self.layer_types:
            return tuple(LAYER_TYPES[t] for t in self.layer_types)
        return tuple("swa" if r == 0 else "csa" if r == 4 else "hca" for r in self.compress_ratios)

    @property
    def shortest_part(self) -> int:
        """Tokens that each part of a row must have: all that its first token looks back to, beside compressed entries,
        then lies in the part before. A block that overlaps looks back to the whole of the block before it."""
        kinds = zip(self.kinds, self.compress_ratios, strict=True)
        return max(self.sliding_window, *(2 * ratio - 1 if kind == "csa" else ratio for kind, ratio in kinds))

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """Reads a ``config.json`` in the released form or as transformers writes it (or a folder that holds one)."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelConfigError(f"{path}: no such file; name a config.json or a folder that holds one") from None
        except ValueError as error:
            raise ModelConfigError(f"{path}: not a JSON file ({error})") from None
        try:
            return cls.from_dict(values)
        except ModelConfigError as error:
            raise ModelConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """From the parsed ``config.json``; keys that say nothing about the architecture are ignored."""
        if not isinstance(values, Mapping):
            raise ModelConfigError("not a JSON object with the keys of a model's config.json")
        for key, kind in _CONTAINERS.items():
            if not isinstance(values.get(key), kind | None):
                raise ModelConfigError(f"{key}={values[key]!r} must be a JSON {'list' if kind is list else 'object'}")
        _refuse_other_architectures(values)
        known = {field.name for field in fields(cls)}
        mine = {key: value for key, value in values.items() if key in known and value is not None}
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or rope.get("compress") or rope
        mine["rope_scaling"] = _yarn(scaling)
        if "compress" in rope:
            mine["compress_rope_theta"] = rope["compress"].get("rope_theta", cls.compress_rope_theta)
            mine["rope_theta"] = rope.get("main", {}).get("rope_theta", cls.rope_theta)
        if "qk_rope_head_dim" not in mine and "head_dim" in mine:
            mine["qk_rope_head_dim"] = int(mine["head_dim"] * values.get("partial_rotary_factor", 0.125))
        if routers := values.get("mlp_layer_types"):
            mine["num_hash_layers"] = count = routers.count("hash_moe")
            if "hash_moe" in routers[count:]:
                raise ModelConfigError(f"mlp_layer_types={routers}: hash-routed layers must come first")
        types = values.get("layer_types") or ()
        if not values.get("compress_ratios") and types:
            rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
            rates.update(values.get("compress_rates") or {})
            mine["compress_ratios"] = [rates.get(kind, 0) for kind in types]
        mine["compress_ratios"] = tuple(mine.get("compress_ratios", ()))
        mine["layer_types"] = tuple(types)
        try:
            return cls(**mine)
        except TypeError as error:
            raise ModelConfigError(f"not a complete DeepSeek-V4 config: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The ``config.json`` of an export: released keys, and the keys transformers needs for other ratios."""
        values = {k: v for k, v in asdict(self).items() if k not in ("rope_scaling", "layer_types", "hc_init")}
        names = {kind: name for name, kind in LAYER_TYPES.items()}
        kinds, ratios = self.kinds, self.compress_ratios
        rates = {names[kind]: ratio for kind, ratio in zip(kinds, ratios, strict=True) if ratio}
        values |= {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "num_key_value_heads": 1,
            "hidden_act": "silu",
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "compress_ratios": list(ratios),
            "layer_types": [names[kind] for kind in kinds[: self.num_hidden_layers]],
            "compress_rates": rates,
        }
        if self.hc_constraint == "sinkhorn":
            del values["hc_constraint"]  # what every reader does
        else:
            values |= {"architectures": [], "model_type": UNCONSTRAINED}
        if self.rope_scaling:
            values["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **asdict(self.rope_scaling)}
        return values


@dataclass(frozen=True)
class LoRAConfig:
    """Which matrices get adapters, and how large.

    Attributes:
        rank: rows of A and columns of B.
        alpha: an adapter's product is multiplied by alpha / rank.
        dropout: of an adapter's input, in training; PEFT has none for wo_a and experts.
        targets: names of ``LORA_TARGETS``.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention", "shared_experts")

    def __post_init__(self) -> None:
        if not (isinstance(self.rank, int) and self.rank >= 1):
            raise ValueError(f"lora.rank = {self.rank!r}: choose a whole number from 1 on, such as 16")
        if not (isinstance(self.alpha, int | float) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha = {self.alpha!r}: choose a positive number, such as twice the rank")
        if not (isinstance(self.dropout, int | float) and 0 <= self.dropout < 1):
            raise ValueError(f"lora.dropout = {self.dropout!r}: choose a number in [0, 1)")
        unknown = [target for target in self.targets if target not in LORA_TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"lora.targets = {list(self.targets)}: choose from {', '.join(LORA_TARGETS)}")
        if self.dropout > 0 and (deaf := [target for target in PEFT_PARAMETERS if target in self.parts]):
            raise ValueError(
                f"lora.dropout = {self.dropout}: PEFT has no dropout for {' and '.join(deaf)}, which lora.targets = "
                f"{list(self.targets)} include; set lora.dropout=0.0 or name targets without"
            )

    @property
    def parts(self) -> frozenset[str]:
        """The targets, groups taken apart."""
        return frozenset(part for target in self.targets for part in _LORA_GROUPS.get(target, (target,)))

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied by."""
        return self.alpha / self.rank


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The same model without its MTP block."""
    main = config.num_hidden_layers
    ratios, types = config.compress_ratios[:main], config.layer_types[:main]
    return replace(config, num_nextn_predict_layers=0, compress_ratios=ratios, layer_types=types)


def _check_numbers(config: Any, prefix: str) -> None:
    """Whole numbers are positive, or 0 where that has a meaning, and fit a tensor's shape; others are positive."""
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        if field.type is int:
            lowest = 0 if field.name in _MAY_BE_ZERO else 1
            if type(value) is not int or not lowest <= value < 2**31:
                rule = "positive" if isinstance(value, int) and value < lowest else "a whole number below 2^31"
                raise ModelConfigError(f"{name}={value!r} must be {rule}")
        elif field.type is float and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ModelConfigError(f"{name}={value!r} must be a positive number")


_MAY_BE_ZERO = ("num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")

_CONTAINERS: dict[str, type] = {
    "compress_ratios": list,
    "layer_types": list,
    "mlp_layer_types": list,
    "compress_rates": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
}

# model_type of checkpoints with hc_constraint=none, so that nothing else takes them for DeepSeek-V4.
UNCONSTRAINED = "openv4_unconstrained"

# What other models under a similar config would ask for, and this code does not do.
_FIXED = {
    "model_type": "deepseek_v4",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "num_key_value_heads": 1,
}


def _refuse_other_architectures(values: Mapping[str, Any]) -> None:
    named = f"{values.get('model_type')} {values.get('architectures')}".lower().replace("_", "")
    if "deepseekv41" in named or "text_config" in values or any("engram" in key for key in values):
        raise ModelConfigError("this is DeepSeek-V4.1, another architecture under similar names; use DeepSeek-V4")
    if drafter := [key for key in values if key.startswith("dspark")]:
        raise ModelConfigError(
            f"{drafter[0]} tells of DeepSeek-V4-Flash-0731 or another DSpark model, whose mtp.* tensors are a drafter "
            "and no MTP block; use DeepSeek-V4-Flash, -Pro or their -Base"
        )
    fixed = _FIXED | ({"model_type": UNCONSTRAINED} if values.get("hc_constraint") == "none" else {})
    for key, wanted in fixed.items():
        if values.get(key, wanted) != wanted:
            raise ModelConfigError(f"{key}={values[key]!r} is not DeepSeek-V4, which has {key}={wanted!r}")


def _yarn(scaling: Mapping[str, Any]) -> YarnConfig | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ModelConfigError(f"rope_scaling of type {kind!r}: DeepSeek-V4 has yarn or none")
    return YarnConfig(**{f.name: scaling[f.name] for f in fields(YarnConfig) if scaling.get(f.name) is not None})
