"""The routed experts: E two-layer MLPs as stacked weights, of which a rank holds its own.

E_i(x) = act(x W_in,i) W_out,i, without biases. There are three ways to compute it;
docs/decisions/0004-experts.md has the measurements. The activation functions are those of MLPs too:
GELU, GPT-2's tanh GELU, LLaMA's SwiGLU.

    gelu, gelu_tanh   act(h) = GELU(h)                  h = x W_in, F wide
    swiglu            act(h) = SiLU(h[:F]) * h[F:]      h = x W_in, 2F wide: gate beside up

Each has its derivative, because the experts' backward is written by hand.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from scmoe.moe.operators import without_autocast


class Activation(NamedTuple):
    """An activation act and its derivative. Buffers that are reused stay in the processor's cache.

    forward(h): act(h). into(h, out): the same, into a buffer, which may be the first columns of h.
    backward_into(da, h, out): the gradient of h, given that of act(h), into a buffer.
    """

    forward: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    backward_into: Callable[[Tensor, Tensor, Tensor], Tensor]
    widening: int = 1  # columns of h for each column of act(h)


def gelu_into(h_RF: Tensor, out_RF: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu.out(h_RF, approximate=approximate, out=out_RF)


def gelu_backward_into(da_RF: Tensor, h_RF: Tensor, out_RF: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(
        da_RF, h_RF, approximate=approximate, grad_input=out_RF
    )


def gelu(approximate: str) -> Activation:
    """Return GELU. Its functions are those of this module, so that experts can be pickled."""
    return Activation(
        partial(F.gelu, approximate=approximate),
        partial(gelu_into, approximate=approximate),
        partial(gelu_backward_into, approximate=approximate),
    )


def swiglu(h_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def swiglu_into(h_RF2: Tensor, out_RF: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate_RF, out=out_RF).mul_(up_RF)


def swiglu_backward_into(da_RF: Tensor, h_RF2: Tensor, out_RF2: Tensor) -> Tensor:
    gate_RF, up_RF = h_RF2.chunk(2, dim=-1)
    dgate_RF, dup_RF = out_RF2.chunk(2, dim=-1)
    torch.mul(da_RF, F.silu(gate_RF), out=dup_RF)
    torch.ops.aten.silu_backward.grad_input(da_RF * up_RF, gate_RF, grad_input=dgate_RF)
    return out_RF2


ACTIVATIONS = {
    "gelu": gelu("none"),
    "gelu_tanh": gelu("tanh"),
    "swiglu": Activation(swiglu, swiglu_into, swiglu_backward_into, widening=2),
}

MLPs = Callable[[Tensor, Tensor, Tensor, Any, Activation], Tensor]
"""A way to compute (rows_RD, w_in_eDF, w_out_eFD, counts_e, act)."""


class Experts(nn.Module):
    """Experts `expert_ids` of `num_experts`.

    Parameters of this class are sharded: stacked on dim 0 by expert. Weights are normal with
    standard deviation 1 / sqrt(fan-in). The global generator gives one key for all of them, so they
    are equal for every split of the experts over ranks. Raises ValueError unless dim and ffn_dim
    are multiples of 8: grouped products require rows aligned to 16 bytes, in bf16 too.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        expert_ids: range | None = None,
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if dim % 8 or ffn_dim % 8 or min(dim, ffn_dim) < 8:
            raise ValueError(
                f"dim is {dim} and ffn_dim is {ffn_dim}, allowed: multiples of 8 above 0"
            )
        self.num_experts = num_experts
        self.expert_ids = range(num_experts) if expert_ids is None else expert_ids
        self.act = ACTIVATIONS[activation]
        num_local_experts, hidden_dim = len(self.expert_ids), self.act.widening * ffn_dim
        self.w_in_eDF = nn.Parameter(torch.empty(num_local_experts, dim, hidden_dim))
        self.w_out_eFD = nn.Parameter(torch.empty(num_local_experts, ffn_dim, dim))
        if not self.w_in_eDF.is_meta:
            key = torch.randint(2**62, (), device="cpu").item()
            self.init_weights(str(key), dim**-0.5, ffn_dim**-0.5)

    def forward(self, rows_RD: Tensor, counts_e: Tensor | None) -> Tensor:
        """Return the experts' outputs [R, D] in the order of the rows.

        They are computed in the dtype of the rows, which the stream chooses. rows_RD: grouped by
        local expert. counts_e: rows of each; None: the same number for every expert. Rows after the
        last expert's are empty: what is returned for them has no meaning.
        """
        w_in_eDF, w_out_eFD = self.w_in_eDF.to(rows_RD.dtype), self.w_out_eFD.to(rows_RD.dtype)
        mlps = choose_mlps(rows_RD, counts_e)
        with without_autocast(rows_RD.device.type):
            return mlps(rows_RD, w_in_eDF, w_out_eFD, counts_e, self.act)

    @torch.no_grad()
    def init_weights(
        self,
        key: str,
        std_in: float,
        std_out: float,
        put: Callable[[Tensor, Tensor], Any] = Tensor.copy_,
    ) -> None:
        """Draw normal weights that depend only on (key, tensor, global expert id).

        They do not depend on the EP degree or on earlier draws. The global generator is left as it
        was. put: copies a value into an expert's weight, or a part of it.
        """
        weights = (("w_in", self.w_in_eDF, std_in), ("w_out", self.w_out_eFD, std_out))
        for name, weight, std in weights:
            for expert, w in zip(self.expert_ids, weight, strict=True):
                generator = named_generator(f"{key}/{name}/{expert}")
                put(w, torch.randn(w.shape, generator=generator, device="cpu") * std)


def named_generator(name: str) -> torch.Generator:
    """Return a new generator on the host that depends only on `name`.

    Draw with device="cpu": Lightning makes the rank's device the default while a model is built,
    and a device refuses a generator of the host.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def choose_mlps(rows_RD: Tensor, counts_e: Tensor | None) -> MLPs:
    """Return the way to compute the experts.

    CPU: one expert after another. GPU: batched if all have the same number of rows, otherwise
    grouped (neither waits for the device); where a GPU has no grouped kernel, one after another.
    """
    if rows_RD.device.type == "cpu":
        return mlps_in_turn
    if counts_e is None or not rows_RD.shape[0]:
        return batched_mlps
    return grouped_mlps if has_grouped_kernel(rows_RD) else mlps_in_turn


def has_grouped_kernel(rows_RD: Tensor) -> bool:
    """Return whether torch (2.13) multiplies these groups in one kernel.

    It does for bfloat16 on cards of capability 9.x and 10.x. Elsewhere it multiplies one after
    another too, and reads the counts on the host in each of its six products.
    """
    if rows_RD.is_cuda and torch.cuda.get_device_capability(rows_RD.device)[0] not in (9, 10):
        return False
    return rows_RD.dtype == torch.bfloat16  # tensors on `meta` take the way of a new GPU


def batched_mlps(
    rows_RD: Tensor,
    w_in_eDF: Tensor,
    w_out_eFD: Tensor,
    counts_e: None,
    act: Activation = ACTIVATIONS["gelu"],
) -> Tensor:
    """Compute experts with equal numbers of rows: one batched product over [e, C, D]. Any dtype."""
    num_experts, dim = w_in_eDF.shape[:2]
    rows_eCD = rows_RD.reshape(num_experts, rows_RD.shape[0] // num_experts, dim)
    return torch.bmm(act.forward(torch.bmm(rows_eCD, w_in_eDF)), w_out_eFD).view_as(rows_RD)


def grouped_mlps(
    rows_RD: Tensor,
    w_in_eDF: Tensor,
    w_out_eFD: Tensor,
    counts_e: Tensor,
    act: Activation = ACTIVATIONS["gelu"],
) -> Tensor:
    """Compute all experts in one kernel per product, where the device has it.

    It takes float32 and bfloat16.
    """
    ends_e = counts_e.cumsum(0).to(torch.int32)
    if rows_RD.is_cuda and torch.cuda.get_device_capability(rows_RD.device)[0] == 10:  # Blackwell
        w_in_eDF, w_out_eFD = zero_if_idle(w_in_eDF, counts_e), zero_if_idle(w_out_eFD, counts_e)
    hidden_RF = act.forward(F.grouped_mm(rows_RD, w_in_eDF, offs=ends_e))
    return F.grouped_mm(hidden_RF, w_out_eFD, offs=ends_e)


def zero_if_idle(w_eDF: Tensor, counts_e: Tensor) -> Tensor:
    """Return the weights; the gradient of an expert without rows is 0.

    On Blackwell a grouped product leaves there what was in memory (pytorch issue 172439).
    """
    if w_eDF.requires_grad:
        w_eDF = w_eDF.view_as(w_eDF)  # a hook on the parameter itself would stay
        w_eDF.register_hook(lambda grad: grad.masked_fill((counts_e == 0)[:, None, None], 0))
    return w_eDF


def mlps_in_turn(
    rows_RD: Tensor,
    w_in_eDF: Tensor,
    w_out_eFD: Tensor,
    counts_e: Tensor | None,
    act: Activation = ACTIVATIONS["gelu"],
) -> Tensor:
    """Compute one expert after another, in any dtype.

    On a host the hidden rows stay in the cache between the products.
    """
    num_experts = w_in_eDF.shape[0]
    if counts_e is None:
        counts = [rows_RD.shape[0] // num_experts for _ in range(num_experts)]
    else:
        counts = counts_e.tolist()
    filled = sum(counts)
    inputs = rows_RD[:filled], w_in_eDF, w_out_eFD
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        y_RD = _MLPsInTurn.apply(*inputs, counts, act)
    else:
        y_RD, _ = _in_turn(*inputs, counts, act, keep=False)
    if filled < rows_RD.shape[0]:
        empty_RD = y_RD.new_zeros(rows_RD.shape[0] - filled, rows_RD.shape[1])
        y_RD = torch.cat([y_RD, empty_RD])
    return y_RD


def _in_turn(
    rows_RD: Tensor,
    w_in_eDF: Tensor,
    w_out_eFD: Tensor,
    counts: list[int],
    act: Activation,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the experts' outputs and, with `keep`, all hidden rows before the activation."""
    y_RD = torch.empty_like(rows_RD)
    most = max(counts)
    hidden_RF = rows_RD.new_empty(rows_RD.shape[0] if keep else most, w_in_eDF.shape[2])
    a_RF = rows_RD.new_empty(most if keep else 0, w_out_eFD.shape[1])
    hs = hidden_RF.split(counts) if keep else repeat(hidden_RF, len(counts))
    experts = zip(
        rows_RD.split(counts),
        hs,
        y_RD.split(counts),
        w_in_eDF.unbind(),
        w_out_eFD.unbind(),
        strict=True,
    )
    for n, (x, h, y, w_in_DF, w_out_FD) in zip(counts, experts, strict=True):
        if n > 0:  # few tokens leave most experts without rows
            h = h[:n]
            torch.mm(x, w_in_DF, out=h)
            a = act.into(h, a_RF[:n] if keep else h[:, : len(w_out_FD)])
            torch.mm(a, w_out_FD, out=y)
    return y_RD, hidden_RF


class _MLPsInTurn(Function):
    """The experts in turn, with a backward by hand, which saves memory and time.

    Each expert's gradient is written into its place in the stack (autograd would build the stack
    again), the activation is computed again (autograd would keep a second [R, F]), and all experts
    share the buffers in between, so that they stay in the cache.
    """

    @staticmethod
    def forward(ctx, rows_RD, w_in_eDF, w_out_eFD, counts, act):
        y_RD, hidden_RF = _in_turn(rows_RD, w_in_eDF, w_out_eFD, counts, act, keep=True)
        ctx.save_for_backward(rows_RD, w_in_eDF, w_out_eFD, hidden_RF)
        ctx.counts, ctx.act = counts, act
        return y_RD

    @staticmethod
    def backward(ctx, dy_RD):
        rows_RD, w_in_eDF, w_out_eFD, hidden_RF = ctx.saved_tensors
        dx_RD, dw_in_eDF, dw_out_eFD = map(torch.empty_like, (rows_RD, w_in_eDF, w_out_eFD))
        most = max(ctx.counts)
        a_RF, da_RF = (rows_RD.new_empty(most, w_out_eFD.shape[1]) for _ in range(2))
        dh_RF = rows_RD.new_empty(most, w_in_eDF.shape[2])
        parts = zip(*(t.split(ctx.counts) for t in (rows_RD, hidden_RF, dy_RD, dx_RD)), strict=True)
        for i, (x, h, dy, dx) in enumerate(parts):
            a, da, dh = (t[: len(h)] for t in (a_RF, da_RF, dh_RF))
            torch.mm(ctx.act.into(h, a).T, dy, out=dw_out_eFD[i])
            torch.mm(dy, w_out_eFD[i].T, out=da)
            ctx.act.backward_into(da, h, dh)
            torch.mm(x.T, dh, out=dw_in_eDF[i])
            torch.mm(dh, w_in_eDF[i].T, out=dx)
        return dx_RD, dw_in_eDF, dw_out_eFD, None, None
