"""This oracle computes every architecture of the paper: flat, slow and obviously correct. It
imports nothing of scmoe.

The functions take a dict of weight tensors, with the names of `model.state_dict()`, and plain
tensors. They compute tokens and experts one by one; gradients come from autograd. All fast code is
compared with these functions.

    Eq. 1        gpt(..., Spec("top_k"))            Eq. 2-5    gate
    Eq. 6        gpt(..., Spec("shared_expert"))    Eq. 7-10   gpt(..., Spec("scmoe"))
    Eq. 14-16    merge                              capacity   kept_copies
    Eq. 23       gpt(..., Spec("dgmoe"))            A.7        gpt(..., Spec("dgmoe_share"))
    FarSkip      gpt(..., Spec("farskip"))          latent attention, where the weights have latents

The weights determine the family. GPT has position embeddings and biases. LLaMA has neither: it has
RMSNorm, rotary positions, its own output weights, fewer heads of K and V if they have fewer rows,
and SwiGLU if W_in is twice as wide as W_out requires.

Dropout, padding and forced balanced routing are left out.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Spec(NamedTuple):
    """The fields say what is computed and have the names of the config."""

    architecture: str
    layers: int
    heads: int
    num_experts: int = 0
    top_k: int = 1
    position: str = "pos2"
    first_position: str | None = None
    combine: str = "cg1"
    coefficient_input: str = "current"
    tap_norm: str = "own"
    every: int = 2
    capacity_factor: float | None = None
    router: str = "softmax"
    router_scale: float = 1.0
    leading_dense: tuple[int, ...] = ()
    scaled_latents: bool = False
    rope_theta: float = 10000.0
    yarn_factor: float = 1.0
    distinct_experts: bool = True


class Routed(NamedTuple):
    """The fields are one MoE module's output [T, D] and its routing."""

    y: Tensor
    chosen: list[list[int]]  # experts of each token, most likely first
    scores: Tensor  # [T, E], which sum to one for each token; E counts zero experts
    logits: Tensor  # [T, E]
    dropped: int


class Answer(NamedTuple):
    logits: Tensor  # [B, S, V]
    token_loss: Tensor
    load_balance_loss: Tensor | None
    z_loss: Tensor | None
    dropped: list[int]  # of each MoE layer
    copies: list[
        list[int]
    ]  # of each MoE layer: routed copies per expert, before any is dropped, no zero experts


# ---------------------------------------------------------------------- parts of a Transformer


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    if f"{name}.bias" not in w:  # RMSNorm
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def activate(h: Tensor, width: int) -> Tensor:
    """Return GELU if h has `width` features, and SwiGLU of gate and up if it has twice as many."""
    if h.shape[-1] == width:
        return gelu(h)
    gate, up = h[..., :width], h[..., width:]
    return gate / (1 + torch.exp(-gate)) * up


def mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    width = w[f"{name}.w_out.weight"].shape[1]
    return linear(w, f"{name}.w_out", activate(linear(w, f"{name}.w_in", x), width))


def turning(i: int, half: int, theta: float, yarn_factor: float) -> float:
    """Return by how much feature pair i of `half` turns from one position to the next:
    theta^(-i/half).

    YaRN divides it by its factor where it turns less than once in 4096 positions, leaves it where
    it turns 32 times, and interpolates between the two pairs where that is so.
    """
    speed = theta ** (-i / half)
    once, often = (
        half * math.log(4096 / (2 * math.pi * turns)) / math.log(theta) for turns in (1, 32)
    )
    first, last = max(math.floor(often), 0), min(math.ceil(once), 2 * half - 1)
    slowed = min(max((i - first) / max(last - first, 0.001), 0), 1)
    return slowed * speed / yarn_factor + (1 - slowed) * speed


def rotate(x: Tensor, theta: float = 10000.0, yarn_factor: float = 1.0) -> Tensor:
    """Add rotary positions to x [S, d]: features i and i + d/2, one complex number, turn by s
    times `turning`."""
    seq_len, half = x.shape[0], x.shape[1] // 2
    z = torch.complex(x[:, :half], x[:, half:])
    angles = [
        [s * turning(i, half, theta, yarn_factor) for i in range(half)] for s in range(seq_len)
    ]
    z = z * torch.exp(1j * torch.tensor(angles, dtype=x.dtype))
    return torch.cat([z.real, z.imag], -1)


def rotate_pairs(x: Tensor, spec: Spec) -> Tensor:
    """As rotate, but features 2 i and 2 i + 1 are one complex number."""
    return rotate(torch.cat([x[:, 0::2], x[:, 1::2]], -1), spec.rope_theta, spec.yarn_factor)


def latent_attention(w: Weights, name: str, x: Tensor, spec: Spec) -> Tensor:
    """Compute multi-head latent attention of x [B, S, D] as published, one sequence and head at a
    time."""
    dim, seq_len, heads = x.shape[2], x.shape[1], spec.heads
    kv_rank = len(w[f"{name}.kv_norm.weight"])
    rope = len(w[f"{name}.kv_down.weight"]) - kv_rank
    nope = len(w[f"{name}.q_up.weight"]) // heads - rope
    value = len(w[f"{name}.kv_up.weight"]) // heads - nope
    future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    sequences = []
    for sequence in x:
        query = sequence
        if f"{name}.q_down.weight" in w:
            query = layer_norm(w, f"{name}.q_norm", linear(w, f"{name}.q_down", sequence), 1e-6)
            query = query * math.sqrt(dim / query.shape[1] if spec.scaled_latents else 1)
        down = linear(w, f"{name}.kv_down", sequence)
        latent = layer_norm(w, f"{name}.kv_norm", down[:, :kv_rank], 1e-6)
        latent = latent * math.sqrt(dim / kv_rank if spec.scaled_latents else 1)
        shared_key = rotate_pairs(down[:, kv_rank:], spec)
        queries, keys_values = linear(w, f"{name}.q_up", query), linear(w, f"{name}.kv_up", latent)
        outputs = []
        for h in range(heads):
            q = queries[:, h * (nope + rope) : (h + 1) * (nope + rope)]
            kv = keys_values[:, h * (nope + value) : (h + 1) * (nope + value)]
            match = q[:, :nope] @ kv[:, :nope].T + rotate_pairs(q[:, nope:], spec) @ shared_key.T
            match = match / math.sqrt(nope + rope) * (0.1 * math.log(spec.yarn_factor) + 1) ** 2
            match = match.masked_fill(future, -math.inf)
            outputs.append(match.softmax(-1) @ kv[:, nope:])
        y = torch.cat(outputs, -1)
        if f"{name}.gate.weight" in w:
            y = y / (1 + torch.exp(-linear(w, f"{name}.gate", sequence)))
        sequences.append(linear(w, f"{name}.out", y))
    return torch.stack(sequences)


def attention(w: Weights, name: str, x: Tensor, spec: Spec) -> Tensor:
    """Compute causal attention of x [B, S, D], one sequence and head at a time. qkv has heads of
    Q, then K, then V."""
    if f"{name}.kv_down.weight" in w:
        return latent_attention(w, name, x, spec)
    heads = spec.heads
    seq_len = x.shape[1]
    size = w[f"{name}.out.weight"].shape[1] // heads
    kv_heads = (w[f"{name}.qkv.weight"].shape[0] // size - heads) // 2
    future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    sequences = []
    for sequence in x:
        qkv = linear(w, f"{name}.qkv", sequence)
        outputs = []
        for h in range(heads):
            kv = h // (heads // kv_heads)
            q, k, v = (
                qkv[:, i * size : (i + 1) * size] for i in (h, heads + kv, heads + kv_heads + kv)
            )
            if "positions.weight" not in w:
                q, k = rotate(q, spec.rope_theta), rotate(k, spec.rope_theta)
            match = (q @ k.T / math.sqrt(size)).masked_fill(future, -math.inf)
            outputs.append(match.softmax(-1) @ v)
        sequences.append(linear(w, f"{name}.out", torch.cat(outputs, -1)))
    return torch.stack(sequences)


def add_attention(w: Weights, name: str, x: Tensor, spec: Spec) -> Tensor:
    return x + attention(w, f"{name}.f", layer_norm(w, f"{name}.norm", x), spec)


def add_mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    return x + mlp(w, f"{name}.f", layer_norm(w, f"{name}.norm", x))


# ---------------------------------------------------------------------- mixture of experts


def scores_of(logits: Tensor, router: str) -> Tensor:
    """Return the scores of a token's experts: sigmoids for deepseek, else probabilities."""
    return (
        1 / (1 + torch.exp(-logits))
        if router == "deepseek"
        else torch.exp(logits - torch.logsumexp(logits, 0))
    )


def gate(
    logits: Tensor,
    top_k: int,
    taken: int | None = None,
    router: str = "softmax",
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[list[int], list[Tensor]]:
    """Return a token's experts, most likely first, and weights, from logits [E] (Eq. 2-5). taken:
    left out (A.2).

    The weights are the scores of the kept experts, for k >= 2 over their sum: for the softmax that
    is a softmax over the kept logits. LongCat's are the scores. bias: added to the scores for the
    choice alone.
    """
    scores = scores_of(logits, router)
    preferred = scores if bias is None else scores + bias
    order = sorted(range(len(logits)), key=lambda i: -preferred[i].item())
    kept = [i for i in order if i != taken][:top_k]
    total = 1 if top_k == 1 or router == "longcat" else sum(scores[i] for i in kept)
    return kept, [scale * scores[i] / total for i in kept]


def moved_bias(
    bias: list[float], copies: list[int], all_copies: int, router: str, rate: float
) -> list[float]:
    """Return a selection bias after an update. bias: of experts, then of zero experts, whose bias
    stays.

    copies: of each expert, in the whole step. all_copies: those to zero experts included. rate:
    relative to the score of equal logits.
    """
    fair = all_copies / len(bias)
    equal = 0.5 if router == "deepseek" else 1 / len(bias)
    moved = list(bias)
    for i, c in enumerate(copies):
        lack = 1 - c / fair
        if router != "longcat":
            lack = 0 if c * len(bias) == all_copies else math.copysign(1, lack)
        moved[i] += rate * equal * lack
    return moved


def noisy_logits(x: Tensor, w_gate: Tensor, w_noise: Tensor, normal: Tensor) -> Tensor:
    """Eq. 3-4: H(x)_i = (x W_gate)_i + n softplus((x W_noise)_i), n: normal numbers, passed in."""
    return x @ w_gate.T + normal * torch.log1p(torch.exp(x @ w_noise.T))


def kept_copies(
    chosen: list[list[int]], num_experts: int, capacity: int | None
) -> set[tuple[int, int]]:
    """Return the kept (token, choice) pairs: first choices before second ones, then early tokens
    before late ones.

    Choices of zero experts, from num_experts on, are not among them."""
    room = [math.inf if capacity is None else capacity] * num_experts
    kept = set()
    for k in range(len(chosen[0])):
        for t in range(len(chosen)):
            if chosen[t][k] < num_experts and room[chosen[t][k]] > 0:
                room[chosen[t][k]] -= 1
                kept.add((t, k))
    return kept


def capacity_of(
    num_tokens: int, num_experts: int, top_k: int, capacity_factor: float | None
) -> int | None:
    """Compute the capacity in exact arithmetic: in floating point 1.1 x 50 is above 55."""
    if capacity_factor is None:
        return None
    return math.ceil(Fraction(str(capacity_factor)) * num_tokens * top_k / num_experts)


def routed_experts(
    w: Weights, name: str, x: Tensor, spec: Spec, taken: list[int] | None = None
) -> Routed:
    """Compute sum_i G(x)_i E_i(x) for tokens x [T, D], one by one. taken: each token's expert to
    leave out (A.2).

    Ids from the number of experts on are zero experts, which return their input.
    """
    w_gate, w_in, w_out = (
        w[f"{name}.{k}"] for k in ("router.gate.weight", "experts.w_in_eDF", "experts.w_out_eFD")
    )
    num_tokens, num_experts, top_k = len(x), len(w_in), spec.top_k
    logits = torch.stack([token @ w_gate.T for token in x])
    how = spec.router, spec.router_scale, w.get(f"{name}.router.bias.weight")
    gates = [gate(logits[t], top_k, taken[t] if taken else None, *how) for t in range(num_tokens)]
    chosen = [experts for experts, _ in gates]
    kept = kept_copies(
        chosen, num_experts, capacity_of(num_tokens, len(w_gate), top_k, spec.capacity_factor)
    )
    outputs, dropped = [], 0
    for t in range(num_tokens):
        y = torch.zeros_like(x[t])
        for k, (expert, weight) in enumerate(zip(*gates[t], strict=True)):
            if expert >= num_experts:
                y = y + weight * x[t]
            elif (t, k) in kept:
                y = y + weight * (activate(x[t] @ w_in[expert], w_out.shape[1]) @ w_out[expert])
            else:
                dropped += 1
        outputs.append(y)
    scores = torch.stack([scores_of(token, spec.router) for token in logits])
    return Routed(
        torch.stack(outputs), chosen, scores / scores.sum(-1, keepdim=True), logits, dropped
    )


def merge(combine: str, w_gate: Tensor | None, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
    """Merge the shared and the routed output (Eq. 14-16)."""
    if combine == "direct_add":
        return shared + routed
    assert w_gate is not None
    if combine == "cg1":
        return shared / (1 + torch.exp(-(x @ w_gate.T))) + routed
    assert combine == "cg2"
    e = torch.exp(x @ w_gate.T)
    return (
        e[..., :1] / e.sum(-1, keepdim=True) * shared
        + e[..., 1:] / e.sum(-1, keepdim=True) * routed
    )


def load_balance_loss(chosen: list[list[int]], scores: Tensor, zero_experts: int = 0) -> Tensor:
    """Return E sum_i f_i P_i: f_i is the share of routed copies that expert i gets, P_i is its
    mean score. The copies of zero experts, the last ones, count as if they were spread evenly over
    these."""
    num_tokens, num_experts = scores.shape
    total = scores.new_zeros(())
    for i in range(num_experts):
        copies = sum(experts.count(i) for experts in chosen)
        if i >= num_experts - zero_experts:
            copies = (
                sum(j >= num_experts - zero_experts for experts in chosen for j in experts)
                / zero_experts
            )
        total = total + copies / (num_tokens * len(chosen[0])) * scores[:, i].sum() / num_tokens
    return num_experts * total


def sequence_loss(chosen: list[list[int]], scores: Tensor, seq_len: int) -> Tensor:
    """Return the mean over sequences of their own load-balance losses (DeepSeek-V3)."""
    starts = range(0, len(chosen), seq_len)
    parts = [load_balance_loss(chosen[i : i + seq_len], scores[i : i + seq_len]) for i in starts]
    return sum(parts) / len(parts)


def z_loss(logits: Tensor) -> Tensor:
    return sum(torch.log(torch.exp(token).sum()) ** 2 for token in logits) / len(logits)


# ---------------------------------------------------------------------- blocks and model

FOLLOWING = {
    "pos1": -1,
    "pos2": -2,
    "pos3": -3,
}  # which of the sub-layers follows the tap, from the end


class Left(NamedTuple):
    """What a block leaves for the next one. after_attention: M_{l-1}. without_routed: FarSkip's
    Y_l."""

    after_attention: Tensor | None = None
    without_routed: Tensor | None = None


def moe_block(
    w: Weights, name: str, h_in: Tensor, spec: Spec, position: str, owner: str, left: Left
) -> tuple[Tensor, Routed, Left]:
    """Compute a pair (Block-MLP, Block-MoE) or one Block-MoE; with one in every fourth block, two
    of Block-MLP before the pair. position: the tap's. owner: the block of its MoE. left: what the
    block before leaves."""
    names = [f"{name}.sublayers.{i}" for i in range(2 * spec.every - 1)]

    def routed(x: Tensor, taken: list[int] | None = None) -> Routed:
        result = routed_experts(w, f"{owner}.moe", x.flatten(0, 1), spec, taken)
        return result._replace(y=result.y.view_as(x))

    if spec.architecture == "farskip":
        y_l = h_in if left.without_routed is None else left.without_routed
        u = layer_norm(w, f"{name}.norm", h_in)
        moe = routed(u)
        attended = attention(w, f"{names[0]}.f", layer_norm(w, f"{names[0]}.norm", y_l), spec)
        y_next = h_in + attended + mlp(w, f"{name}.shared_expert", u)
        return y_next + moe.y, moe, Left(without_routed=y_next)
    if spec.every == 4:
        for i in (0, 2):
            h_in = add_mlp(w, names[i + 1], add_attention(w, names[i], h_in, spec))
    if spec.every > 1:
        attention_l, mlp_l, attention_next = names[-3:]
        h_mh = add_attention(w, attention_l, h_in, spec)  # H_l^MH
        h_mlp = add_mlp(w, mlp_l, h_mh)  # H_l^MLP
        h = add_attention(w, attention_next, h_mlp, spec)  # H_{l+1}^MH
        taps = {"pos1": h_mlp, "pos2": h_mh, "pos3": h_in}
    else:
        h = add_attention(w, names[0], h_in, spec)
        # the preceding block's output is this block's input; its H^MH is what it leaves, but in the
        # first block
        taps = {"pos1": h_in, "pos2": h if left.after_attention is None else left.after_attention}

    def add(y: Tensor) -> Tensor:
        return h + (
            layer_norm(w, f"{name}.after.norm", y) if f"{name}.after.norm.weight" in w else y
        )

    u = layer_norm(w, f"{name}.norm", h)
    if spec.architecture == "top_k":  # Eq. 1
        moe = routed(u)
        return add(moe.y), moe, Left(h)
    tap_norm = (
        f"{name}.tap_norm" if spec.tap_norm == "own" else f"{names[FOLLOWING[position]]}.norm"
    )
    if spec.architecture in ("dgmoe", "dgmoe_share"):  # Eq. 23, A.7
        preceding = routed(layer_norm(w, tap_norm, taps[position]))
        taken = [experts[0] for experts in preceding.chosen] if spec.distinct_experts else None
        current = routed(u, taken)
        return add(current.y + preceding.y), both(current, preceding), Left(h)
    shared = mlp(w, f"{name}.shared_expert", u)
    w_coefficient = w.get(f"{name}.coefficient.gate.weight")
    if spec.architecture == "shared_expert":  # Eq. 6
        moe = routed(u)
        return add(merge(spec.combine, w_coefficient, u, shared, moe.y)), moe, Left(h)
    assert spec.architecture == "scmoe"  # Eq. 7-10
    tap = layer_norm(w, tap_norm, taps[position])
    moe = routed(tap)
    read = u if spec.coefficient_input == "current" else tap
    return add(merge(spec.combine, w_coefficient, read, shared, moe.y)), moe, Left(h)


def both(a: Routed, b: Routed) -> Routed:
    """Join two uses of one MoE module: outputs are added, and loads count as if there were twice
    as many tokens."""
    joined = torch.cat([a.scores, b.scores]), torch.cat([a.logits, b.logits])
    return Routed(a.y + b.y, a.chosen + b.chosen, *joined, a.dropped + b.dropped)


def gpt(w: Weights, spec: Spec, ids: Tensor, labels: Tensor) -> Answer:
    """Compute pre-norm blocks and the mean next-token loss. GPT has learned positions and tied
    output weights."""
    positions = w.get("positions.weight", torch.zeros(ids.shape[1], 1))
    rows = [
        [w["tokens.weight"][i] + positions[s] for s, i in enumerate(row)] for row in ids.tolist()
    ]
    x = torch.stack([torch.stack(row) for row in rows])
    modules: list[Routed] = []
    left = Left()
    if spec.architecture == "dense":
        for i in range(spec.layers):
            x = add_attention(w, f"blocks.{i}.sublayers.0", x, spec)
            x = add_mlp(w, f"blocks.{i}.sublayers.1", x)
    else:
        first = len(spec.leading_dense)
        for i in range(first):
            attended = add_attention(w, f"blocks.{i}.sublayers.0", x, spec)
            if spec.architecture == "farskip":  # both read the block's input
                x = attended + add_mlp(w, f"blocks.{i}.sublayers.1", x) - x
            else:
                x = add_mlp(w, f"blocks.{i}.sublayers.1", attended)
        for i in range(first, first + (spec.layers - first) // spec.every):
            position = spec.first_position if i == first and spec.first_position else spec.position
            owner = first + (i - first) // 2 * 2 if spec.architecture == "dgmoe_share" else i
            x, moe, left = moe_block(w, f"blocks.{i}", x, spec, position, f"blocks.{owner}", left)
            modules.append(moe)
    logits = layer_norm(w, "norm", x) @ w.get("head.weight", w["tokens.weight"]).T
    targets = [
        (b, s, label) for b, row in enumerate(labels.tolist()) for s, label in enumerate(row)
    ]
    token_loss = sum(
        torch.logsumexp(logits[b, s], 0) - logits[b, s, label] for b, s, label in targets
    ) / len(targets)
    if not modules:
        return Answer(logits, token_loss, None, None, [], [])
    experts = spec.num_experts or modules[0].scores.shape[1]
    if spec.router == "deepseek":
        balance = sum(sequence_loss(m.chosen, m.scores, ids.shape[1]) for m in modules) / len(
            modules
        )
    else:
        zero = modules[0].scores.shape[1] - experts
        balance = sum(load_balance_loss(m.chosen, m.scores, zero) for m in modules) / len(modules)
    z = sum(z_loss(m.logits) for m in modules) / len(modules)
    copies = [[sum(e.count(i) for e in m.chosen) for i in range(experts)] for m in modules]
    return Answer(logits, token_loss, balance, z, [m.dropped for m in modules], copies)
