"""DeepSeek-V4 in loops: a float64 reference written from the specification alone, for the tests to compare against.

It shares no code with the package. One document at a time, positions from 0, no quantisation, no Hadamard rotation
(orthogonal: without quantisation it changes nothing). Everything but the discrete choices is differentiable.
Tensors carry their released names (recipe 8.3); `config` has the key names of the released config.json, plus an
optional `csa_ratio` (default 4): the compress ratio that means CSA; any other positive ratio means HCA.
Shapes: T tokens, d hidden, n residual streams, c head_dim, E experts, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


class Result(NamedTuple):
    """What `forward` computed. Layer names are "layers.3" and "mtp.0"."""

    logits: Tensor  # [T, V]
    mtp_logits: Tensor | None  # [T-1, V]; position t has read token t+1 and predicts token t+2
    chosen_experts: dict[str, list[list[int]]]  # per token; best first (hash layers: in the table's order)
    router_scores: dict[str, Tensor]  # [T, E], s = sqrt(softplus(logits))
    selected_entries: dict[str, list[list[int]]]  # CSA layers: the compressed entries each token attends, ascending
    streams: Tensor  # [T, n, d] before the head collapse


class Losses(NamedTuple):
    """Cross-entropy sums with their token counts, and the balance loss (without alpha) of each learned router."""

    main_sum: Tensor
    main_count: int
    mtp_sum: Tensor
    mtp_count: int
    balance: dict[str, Tensor]


# ---- small parts


def under(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Return the tensors below `prefix`, their names without it."""
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis; `weight` None is the unweighted one."""
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def best(values: list[float], k: int) -> list[int]:
    """Return the indices of the k largest values, best first; equal values go to the lowest index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def frequencies(cfg: Config, ratio: int) -> Tensor:
    """Rotary frequencies (recipe 2.1): plain `rope_theta` in SWA layers, else `compress_rope_theta` with YaRN."""
    dim = int(cfg["qk_rope_head_dim"])
    base = float(cfg["compress_rope_theta"] if ratio else cfg["rope_theta"])
    theta = [base ** (-2 * i / dim) for i in range(dim // 2)]
    yarn = cfg.get("rope_scaling")
    if ratio and yarn:

        def pair_turning(beta: float) -> float:
            """Which pair turns `beta` times over the original context."""
            original = float(yarn["original_max_position_embeddings"])
            return dim * math.log(original / (2 * math.pi * beta)) / (2 * math.log(base))

        low = max(math.floor(pair_turning(yarn["beta_fast"])), 0)
        high = min(math.ceil(pair_turning(yarn["beta_slow"])), dim - 1)
        for i in range(dim // 2):
            ramp = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            theta[i] = theta[i] * (1 - ramp) + theta[i] / yarn["factor"] * ramp
    return torch.tensor(theta, dtype=torch.float64)


def rotate(x: Tensor, position: int, theta: Tensor) -> Tensor:
    """Turn the last 2*len(theta) dims of x, pairs (2i, 2i+1), by position * theta_i (recipe 2.1)."""
    angle = position * theta
    keep, turn = x[..., : -2 * len(theta)], x[..., -2 * len(theta) :]
    re, im = turn[..., 0::2], turn[..., 1::2]
    pairs = torch.stack([re * angle.cos() - im * angle.sin(), re * angle.sin() + im * angle.cos()], dim=-1)
    return torch.cat([keep, pairs.flatten(-2)], dim=-1)


# ---- attention


def compress(cfg: Config, w: Weights, x: Tensor, ratio: int, dim: int, overlap: bool, theta: Tensor) -> Tensor:
    """Compressed entries [T // ratio, dim] (recipe 2.2); a trailing partial block yields none.

    Every block softmaxes its slots per channel. With overlap the projections are twice as wide: the second half is a
    token's contribution to its own block, the first half its contribution to the next block.
    """
    kv, gate, ape = x @ w["wkv.weight"].T, x @ w["wgate.weight"].T, w["ape"]
    own = slice(dim, 2 * dim) if overlap else slice(0, dim)
    entries = [x.new_zeros(0, dim)]
    for i in range(len(x) // ratio):
        values, scores = [], []
        for j in range(ratio):
            values.append(kv[i * ratio + j, own])
            scores.append(gate[i * ratio + j, own] + ape[j, own])
        if overlap and i > 0:
            for j in range(ratio):
                values.append(kv[(i - 1) * ratio + j, :dim])
                scores.append(gate[(i - 1) * ratio + j, :dim] + ape[j, :dim])
        share = torch.softmax(torch.stack(scores), dim=0)
        entry = (share * torch.stack(values)).sum(0)
        entries.append(rotate(rms_norm(entry, w["norm.weight"], cfg["rms_norm_eps"]), i * ratio, theta)[None])
    return torch.cat(entries)


def index_selection(cfg: Config, w: Weights, x: Tensor, cq: Tensor, ratio: int, theta: Tensor) -> list[list[int]]:
    """Lightning indexer (recipe 2.3): per token the top-k visible entries by sum_h w_h relu(q_h . k)."""
    heads, dim = cfg["index_n_heads"], cfg["index_head_dim"]
    with torch.no_grad():
        keys = compress(cfg, under(w, "compressor."), x, ratio, dim, True, theta)
        selection = []
        for t in range(len(x)):
            q = rotate((w["wq_b.weight"] @ cq[t]).view(heads, dim), t, theta)
            head_weight = (w["weights_proj.weight"] @ x[t]) * dim**-0.5 * heads**-0.5
            scores = []
            for s in range((t + 1) // ratio):
                scores.append(sum(float(head_weight[h] * torch.relu(q[h] @ keys[s])) for h in range(heads)))
            selection.append(sorted(best(scores, cfg["index_topk"])))
    return selection


def attention_layer(cfg: Config, w: Weights, x: Tensor, ratio: int, mode: str) -> tuple[Tensor, list[list[int]] | None]:
    """One attention sublayer (recipe 2.1, 2.4) on normed inputs x [T, d]; also what each token of a CSA layer sees."""
    heads, c, groups, eps = cfg["num_attention_heads"], cfg["head_dim"], cfg["o_groups"], cfg["rms_norm_eps"]
    theta = frequencies(cfg, ratio)
    is_csa = ratio == cfg.get("csa_ratio", 4)
    T = len(x)

    cq = rms_norm(x @ w["wq_a.weight"].T, w["q_norm.weight"], eps)
    window_kv = [rotate(rms_norm(w["wkv.weight"] @ x[t], w["kv_norm.weight"], eps), t, theta) for t in range(T)]
    if ratio:
        entries = compress(cfg, under(w, "compressor."), x, ratio, c, is_csa, theta)
    visible: list[list[int]] = [list(range((t + 1) // ratio)) if ratio else [] for t in range(T)]
    if is_csa and mode == "sparse":
        visible = index_selection(cfg, under(w, "indexer."), x, cq, ratio, theta)

    outputs = []
    for t in range(T):
        window = range(max(0, t - cfg["sliding_window"] + 1), t + 1)
        keys = torch.stack([window_kv[j] for j in window] + [entries[i] for i in visible[t]])
        q = rotate(rms_norm((w["wq_b.weight"] @ cq[t]).view(heads, c), None, eps), t, theta)
        head_outputs = []
        for h in range(heads):
            z = torch.cat([keys @ q[h] * c**-0.5, w["attn_sink"][h : h + 1]])
            p = torch.softmax(z, dim=0)[:-1]  # the sink is in the denominator only
            head_outputs.append(rotate(p @ keys, -t, theta))
        outputs.append(torch.cat(head_outputs))

    o = torch.stack(outputs).view(T, groups, heads * c // groups)
    wo_a = w["wo_a.weight"].view(groups, cfg["o_lora_rank"], heads * c // groups)
    u = torch.cat([o[:, g] @ wo_a[g].T for g in range(groups)], dim=-1)
    return u @ w["wo_b.weight"].T, visible if is_csa else None


# ---- mixture of experts


def swiglu(w: Weights, x: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU before its down projection (recipe 3); limit 0 means no clamp."""
    a, u = w["w1.weight"] @ x, w["w3.weight"] @ x
    if limit > 0:
        a, u = a.clamp(max=limit), u.clamp(-limit, limit)
    return F.silu(a) * u


def moe_layer(cfg: Config, w: Weights, x: Tensor, tokens: list[int]) -> tuple[Tensor, list[list[int]], Tensor]:
    """Mixture of experts (recipe 3): output [T, d], the experts chosen per token, the scores [T, E]."""
    limit, k = cfg["swiglu_limit"], cfg["num_experts_per_tok"]
    experts = [under(w, f"experts.{e}.") for e in range(cfg["n_routed_experts"])]
    shared = under(w, "shared_experts.")
    scores = F.softplus(x @ w["gate.weight"].T).sqrt()
    outputs, chosen = [], []
    for t, token in enumerate(tokens):
        if "gate.tid2eid" in w:
            choice = [int(e) for e in w["gate.tid2eid"][token]]
        else:
            choice = best((scores[t] + w["gate.bias"]).tolist(), k)
        total = scores[t][choice].sum()
        y = shared["w2.weight"] @ swiglu(shared, x[t], limit)
        for e in choice:
            route_weight = scores[t, e] / total * cfg["routed_scaling_factor"]
            y = y + experts[e]["w2.weight"] @ (route_weight * swiglu(experts[e], x[t], limit))
        outputs.append(y)
        chosen.append(choice)
    return torch.stack(outputs), chosen, scores


def balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """Sequence-wise balance loss of one document without alpha (recipe 3, V3's formula): sum_e f_e P_e.

    f_e counts the top-k of the unbiased scores and carries no gradient; P_e is the mean normalised score.
    """
    T, E = scores.shape
    counts = [0] * E
    for t in range(T):
        for e in best(scores[t].tolist(), top_k):
            counts[e] += 1
    value = scores.new_zeros(())
    for e in range(E):
        f_e = E / (top_k * T) * counts[e]
        value = value + f_e * (scores[:, e] / scores.sum(-1)).mean()
    return value


# ---- hyper-connections


def mhc_projection(cfg: Config, fn: Tensor, X: Tensor) -> Tensor:
    """m = rho * (fn vec(X)) (recipe 4), vec stream-major, rho its unweighted RMS factor."""
    return rms_norm(X.flatten(1), None, cfg["rms_norm_eps"]) @ fn.T


def mhc_coefficients(cfg: Config, w: Weights, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Read weights A [T, n], write weights C [T, n] and mixing K [T, source, destination] of a site (recipe 4)."""
    n, eps = cfg["hc_mult"], cfg["hc_eps"]
    m, scale, base = mhc_projection(cfg, w["fn"], X), w["scale"], w["base"]
    A = torch.sigmoid(scale[0] * m[:, :n] + base[:n]) + eps
    C = 2 * torch.sigmoid(scale[1] * m[:, n : 2 * n] + base[n : 2 * n])
    K = torch.softmax((scale[2] * m[:, 2 * n :] + base[2 * n :]).view(-1, n, n), dim=2) + eps
    K = K / (K.sum(1, keepdim=True) + eps)
    for _ in range(cfg["hc_sinkhorn_iters"] - 1):
        K = K / (K.sum(2, keepdim=True) + eps)
        K = K / (K.sum(1, keepdim=True) + eps)
    return A, C, K


def collapse(A: Tensor, X: Tensor) -> Tensor:
    """y = sum_j A_j X_j."""
    return torch.stack([A[:, j, None] * X[:, j] for j in range(X.shape[1])]).sum(0)


def update(C: Tensor, K: Tensor, y: Tensor, X: Tensor) -> Tensor:
    """X'_k = C_k y + sum_j K_jk X_j: j is the source, k the destination."""
    n = X.shape[1]
    return torch.stack([C[:, k, None] * y + collapse(K[:, :, k], X) for k in range(n)], dim=1)


def head_collapse(cfg: Config, w: Weights, X: Tensor) -> Tensor:
    """The streams' weighted sum before a head's norm (recipe 4)."""
    m = mhc_projection(cfg, w["hc_head_fn"], X)
    return collapse(torch.sigmoid(w["hc_head_scale"] * m + w["hc_head_base"]) + cfg["hc_eps"], X)


# ---- the model


def forward(
    config: Config, weights: Weights, tokens: list[int], *, attention: str = "sparse", mtp: bool = False
) -> Result:
    """Run one document. `attention` "dense": tokens of CSA layers attend every visible entry, without the indexer."""
    if attention not in ("sparse", "dense"):
        raise ValueError(f"attention {attention!r} is neither 'sparse' nor 'dense'")
    w = {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}
    depth, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    chosen: dict[str, list[list[int]]] = {}
    scores: dict[str, Tensor] = {}
    selected: dict[str, list[list[int]]] = {}

    def block(name: str, index: int, X: Tensor, ids: list[int]) -> Tensor:
        p = under(w, f"{name}.")
        A, C, K = mhc_coefficients(config, under(p, "hc_attn_"), X)
        x = rms_norm(collapse(A, X), p["attn_norm.weight"], eps)
        y, seen = attention_layer(config, under(p, "attn."), x, config["compress_ratios"][index], attention)
        X = update(C, K, y, X)
        A, C, K = mhc_coefficients(config, under(p, "hc_ffn_"), X)
        x = rms_norm(collapse(A, X), p["ffn_norm.weight"], eps)
        y, chosen[name], scores[name] = moe_layer(config, under(p, "ffn."), x, ids)
        if seen is not None:
            selected[name] = seen
        return update(C, K, y, X)

    X = torch.stack([w["embed.weight"][tokens]] * config["hc_mult"], dim=1)
    for i in range(depth):
        X = block(f"layers.{i}", i, X, tokens)
    logits = rms_norm(head_collapse(config, w, X), w["norm.weight"], eps) @ w["head.weight"].T

    mtp_logits = None
    if mtp:  # recipe 9: one more block, whose position t also reads token t+1
        p = under(w, "mtp.0.")
        mtp_logits = logits.new_zeros(0, logits.shape[1])
        if len(tokens) > 1:
            e = rms_norm(w["embed.weight"][tokens[1:]], p["enorm.weight"], eps) @ p["e_proj.weight"].T
            h = rms_norm(X[:-1], p["hnorm.weight"], eps) @ p["h_proj.weight"].T
            Z = block("mtp.0", depth, e[:, None] + h, tokens[1:])
            mtp_logits = rms_norm(head_collapse(config, p, Z), p["norm.weight"], eps) @ w["head.weight"].T
    return Result(logits, mtp_logits, chosen, scores, selected, X)


def losses(
    config: Config, weights: Weights, tokens: list[int], *, attention: str = "sparse", mtp: bool = False
) -> Losses:
    """Cross-entropy sums of the next token and (MTP) of the one after it, and each learned router's balance loss."""
    run = forward(config, weights, tokens, attention=attention, mtp=mtp)

    def cross_entropy(logits: Tensor, targets: list[int]) -> Tensor:
        log_p = torch.log_softmax(logits, dim=-1)
        return sum((-log_p[t, target] for t, target in enumerate(targets)), start=logits.new_zeros(()))

    mtp_sum = run.logits.new_zeros(()) if run.mtp_logits is None else cross_entropy(run.mtp_logits, tokens[2:])
    balance = {
        name: balance_loss(s, config["num_experts_per_tok"])
        for name, s in run.router_scores.items()
        if f"{name}.ffn.gate.tid2eid" not in weights
    }
    mtp_count = max(len(tokens) - 2, 0) if mtp else 0
    return Losses(cross_entropy(run.logits, tokens[1:]), len(tokens) - 1, mtp_sum, mtp_count, balance)


# ---- weights


def random_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """Draw every released tensor (recipe 8.3) in float64, so large that no mechanism of the model stays idle."""
    rng = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}

    def normal(name: str, *shape: int, std: float = 1.0, mean: float = 0.0) -> None:
        out[name] = mean + std * torch.randn(*shape, generator=rng, dtype=torch.float64)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        normal(f"{name}.weight", rows, columns, std=gain * columns**-0.5)

    def norm(name: str, size: int) -> None:
        normal(f"{name}.weight", size, std=0.2, mean=1.0)

    def hyper(name: str, rows: int, gates: int) -> None:
        normal(f"{name}_fn", rows, n * d, std=(n * d) ** -0.5)
        normal(f"{name}_base", rows)
        normal(f"{name}_scale", gates, std=0.2, mean=0.8)

    def compressor(name: str, ratio: int, size: int, halves: int) -> None:
        linear(f"{name}.wkv", halves * size, d)
        linear(f"{name}.wgate", halves * size, d)
        normal(f"{name}.ape", ratio, halves * size)
        norm(f"{name}.norm", size)

    def block(name: str, index: int) -> None:
        for site in ("attn", "ffn"):
            norm(f"{name}.{site}_norm", d)
            hyper(f"{name}.hc_{site}", 2 * n + n * n, 3)
        a = f"{name}.attn"
        normal(f"{a}.attn_sink", heads)
        linear(f"{a}.wq_a", q_rank, d)
        norm(f"{a}.q_norm", q_rank)
        linear(f"{a}.wq_b", heads * c, q_rank)
        linear(f"{a}.wkv", c, d)
        norm(f"{a}.kv_norm", c)
        linear(f"{a}.wo_a", config["o_groups"] * config["o_lora_rank"], heads * c // config["o_groups"], 2.0)
        linear(f"{a}.wo_b", d, config["o_groups"] * config["o_lora_rank"], 2.0)
        ratio = config["compress_ratios"][index]
        is_csa = ratio == config.get("csa_ratio", 4)
        if ratio:
            compressor(f"{a}.compressor", ratio, c, 2 if is_csa else 1)
        if is_csa:
            linear(f"{a}.indexer.wq_b", config["index_n_heads"] * config["index_head_dim"], q_rank)
            linear(f"{a}.indexer.weights_proj", config["index_n_heads"], d)
            compressor(f"{a}.indexer.compressor", ratio, config["index_head_dim"], 2)
        linear(f"{name}.ffn.gate", experts, d, 1.5)
        if index < config["num_hash_layers"]:
            table = [torch.randperm(experts, generator=rng)[: config["num_experts_per_tok"]] for _ in range(vocab)]
            out[f"{name}.ffn.gate.tid2eid"] = torch.stack(table)
        else:
            normal(f"{name}.ffn.gate.bias", experts, std=0.3)
        for expert in [f"experts.{e}" for e in range(experts)] + ["shared_experts"]:
            for part, rows, columns in (("w1", inner, d), ("w2", d, inner), ("w3", inner, d)):
                linear(f"{name}.ffn.{expert}.{part}", rows, columns, 1.5)

    d, n, vocab = config["hidden_size"], config["hc_mult"], config["vocab_size"]
    heads, c, q_rank = config["num_attention_heads"], config["head_dim"], config["q_lora_rank"]
    experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
    normal("embed.weight", vocab, d)
    linear("head", vocab, d)
    norm("norm", d)
    hyper("hc_head", n, 1)
    for i in range(config["num_hidden_layers"]):
        block(f"layers.{i}", i)
    for i in range(config["num_nextn_predict_layers"]):
        block(f"mtp.{i}", config["num_hidden_layers"] + i)
        hyper(f"mtp.{i}.hc_head", n, 1)
        for name, size in (("enorm", d), ("hnorm", d), ("norm", d)):
            norm(f"mtp.{i}.{name}", size)
        linear(f"mtp.{i}.e_proj", d, d)
        linear(f"mtp.{i}.h_proj", d, d)
    return out
