"""The parts of a Transformer block: attention, MLP, and the residual sub-layer around each."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scmoe.blocks.kv_cache import CAUSAL, KVCache, Visible, with_cache
from scmoe.blocks.rotary import Rotary
from scmoe.moe.experts import ACTIVATIONS, Experts

METHODS = ("forward", "core")  # that can be recomputed; core: of attention in two parts


class SelfAttention(nn.Module):
    """The base of every attention module: what the models and the cost estimates read.

    out: the product that writes to the residual stream. A Decoder requires it, to draw its weights.
    """

    dim: int
    heads: int
    out: nn.Linear

    @property
    def mixed(self) -> int:
        """Multiplications of a row for each row that it attends to, by keys and by values.

        All heads are counted together.
        """
        return 2 * self.dim

    def context(self, seq_len: int) -> int:
        """Return the number of rows that each row attends to, masked ones included.

        It is smaller within windows.
        """
        return seq_len


class PartedAttention(SelfAttention):
    """Attention in two parts, between which a schedule can run experts."""

    def core(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the heads' results of each row, before the output projection.

        cache: has what it keeps of the tokens before x; that of x is appended.
        """
        raise NotImplementedError

    def forward(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.out(self.core(x_BSD, cache))


class Attention(PartedAttention):
    """Causal multi-head self-attention, softmax(Q K^T / sqrt(d)) V.

    It is flash attention where torch has it. kv_heads: heads of K and V, each read by heads /
    kv_heads of Q (grouped-query attention); None: as many as heads. rotary: turns Q and K by their
    positions; None: the input contains its positions. head_dim: features of a head (d); None: dim /
    heads. Raises ValueError where heads do not divide dim and no head_dim is given, or kv_heads do
    not divide heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        bias: bool = True,
        kv_heads: int | None = None,
        rotary: Rotary | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if head_dim is None and dim % heads:
            raise ValueError(f"heads is {heads}, allowed: divisors of dim ({dim})")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}, allowed: 1 or more")
        if heads % kv_heads:
            raise ValueError(f"kv_heads is {kv_heads}, allowed: divisors of heads ({heads})")
        self.dim = dim
        self.heads = heads
        self.kv_heads = kv_heads
        self.rotary = rotary
        head_dim = dim // heads if head_dim is None else head_dim
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)

    @property
    def mixed(self) -> int:
        return 2 * self.out.in_features

    def core(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the heads' results [B, S, H d].

        cache: has the keys and values of the tokens before x; those of x are appended.
        """
        if x_BSD.dim() != 3:
            raise ValueError(
                f"x has the shape {tuple(x_BSD.shape)}, allowed: (batch, sequence, {self.dim})"
            )
        all_heads = self.heads + 2 * self.kv_heads
        all_BHSd = self.qkv(x_BSD).unflatten(-1, (all_heads, -1)).transpose(1, 2)
        q_BHSd, k_BHSd, v_BHSd = all_BHSd.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.rotary is not None:
            positions = None if cache is None else cache.positions_BS[:, None]
            turned_BHSd = self.rotary(all_BHSd[:, : -self.kv_heads], positions)
            q_BHSd, k_BHSd = turned_BHSd.split([self.heads, self.kv_heads], dim=1)
        visible = CAUSAL
        if cache is not None:
            k_BHSd, v_BHSd, visible = cache.extend(self, k_BHSd, v_BHSd)
        return attend(q_BHSd, k_BHSd, v_BHSd, visible).transpose(1, 2).flatten(2)


def attend(q_BHSd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, visible: Visible) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V [B, H, S, d]; H / G heads of Q read one of K and V."""
    grouped = bool(k_BGLd.shape[1] < q_BHSd.shape[1])  # sizes are tensors in torch.jit.trace
    # none of a GPU's fused kernels takes a mask and groups
    if grouped and visible.mask_B1SL is not None and q_BHSd.is_cuda:
        return attend_by_group(q_BHSd, k_BGLd, v_BGLd, visible.mask_B1SL)
    return F.scaled_dot_product_attention(
        q_BHSd, k_BGLd, v_BGLd, visible.mask_B1SL, is_causal=visible.is_causal, enable_gqa=grouped
    )


def attend_by_group(q_BHSd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask_B1SL: Tensor) -> Tensor:
    """Return the same without groups and without copies of K and V.

    The heads of a group are further rows of one head.
    """
    groups, S = k_BGLd.shape[1], q_BHSd.shape[2]
    q_BGSd = q_BHSd.unflatten(1, (groups, -1)).flatten(2, 3)
    mask_B1SL = mask_B1SL.repeat(1, 1, q_BGSd.shape[2] // S, 1)
    y_BGSd = F.scaled_dot_product_attention(q_BGSd, k_BGLd, v_BGLd, mask_B1SL)
    return y_BGSd.unflatten(2, (-1, S)).flatten(1, 2)


class MLP(nn.Module):
    """act(x W_in) W_out: the MLP of Block-MLP, and the shared expert.

    For SwiGLU W_in holds gate and up.
    """

    def __init__(self, dim: int, ffn_dim: int, bias: bool = True, activation: str = "gelu") -> None:
        super().__init__()
        if ffn_dim < 1:
            raise ValueError(f"ffn_dim is {ffn_dim}, allowed: 1 or more")
        self.dim, self.act = dim, ACTIVATIONS[activation]
        self.w_in = nn.Linear(dim, self.act.widening * ffn_dim, bias=bias)
        self.w_out = nn.Linear(ffn_dim, dim, bias=bias)

    def forward(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return act(x W_in) W_out.

        cache: not read, because a token's result does not depend on other tokens.
        """
        return self.w_out(self.act.forward(self.w_in(x_BSD)))


class Residual(nn.Module):
    """x + after(f(norm(x))).

    Pre-norm: a norm, and dropout after. Post-norm: no norm before, and the norm after.

    onto: what the result is added to instead of x (FarSkip). core: the result of `core` for x; what
    is left to compute is attention's output projection, and the sum.
    """

    f: Any

    def __init__(self, norm: nn.Module, f: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.f = f
        self.after = after or nn.Identity()
        self.parted = isinstance(f, PartedAttention)

    def core(self, x_BSD: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the first part of an attention sub-layer; forward with it is the second."""
        return self.f.core(*with_cache(self.norm(x_BSD), cache=cache))

    def forward(
        self,
        x_BSD: Tensor,
        cache: KVCache | None = None,
        *,
        onto: Tensor | None = None,
        core: Tensor | None = None,
    ) -> Tensor:
        if core is None:
            y_BSD = self.f(*with_cache(self.norm(x_BSD), cache=cache))
        else:
            y_BSD = self.f.out(core)
        return (x_BSD if onto is None else onto) + self.after(y_BSD)


def is_parted(sublayer: nn.Module) -> bool:
    """Return whether a sub-layer can be called in two parts, as a Residual of PartedAttention."""
    return getattr(sublayer, "parted", False) is True


def outermost(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Yield the modules of these classes that are not inside a sub-layer."""
    sublayers = [module for module in model.modules() if isinstance(module, Residual)]
    inside = {child for outer in sublayers for child in outer.modules() if child is not outer}
    for module in model.modules():
        if isinstance(module, kinds) and module not in inside:
            yield module


def compile_sublayers(model: nn.Module) -> int:
    """Compile every sub-layer and shared expert of `model` and return their number.

    A first step then takes seconds. A whole block cannot be one graph: the MoE stream's layout and
    transfers are not compiled, and each of them would be a graph break. Sub-layers of equal shape
    share one graph.
    """
    parts: list[Any] = list(outermost(model, (Residual, MLP)))
    for part in parts:
        part.compile()
        part.parted = False  # it is one graph
    return len(parts)


def recompute_activations(model: nn.Module, keep_input: Callable[..., Any] = checkpoint) -> None:
    """Let every sub-layer, shared expert and Experts module keep its input, not its activations.

    Routing, layout and transfers are not repeated in backward: a second routing could differ
    (noise, ties), and a second transfer would cost the time that the shortcut hides. keep_input:
    called as torch's checkpoint.
    """
    for module in outermost(model, (Residual, MLP, Experts)):
        for method in METHODS if is_parted(module) else METHODS[:1]:
            before = vars(module).get(method)  # hooks of accelerate stand there
            setattr(module, method, partial(recompute, module, method, before, keep_input))


def keep_activations(model: nn.Module) -> None:
    """Undo `recompute_activations`."""
    for module in model.modules():
        for method in METHODS:
            current = vars(module).get(method)
            if isinstance(current, partial) and current.func is recompute:
                before = current.args[2]
                if before is None:
                    delattr(module, method)
                else:
                    setattr(module, method, before)


def recompute(
    module: nn.Module,
    method: str,
    before: Callable[..., Any] | None,
    keep_input: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a method of a module with checkpointing.

    module: a deep copy of a partial of this function holds the copied module. before: the
    instance's earlier method; None: that of its class."""
    f = partial(getattr(type(module), method), module) if before is None else before
    return keep_input(f, *args, use_reentrant=False, **kwargs)
