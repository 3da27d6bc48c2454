"""The routed experts: E two-layer MLPs as stacked weights, of which a rank holds its own.

E_i(x) = GELU(x W_in,i) W_out,i, without biases (docs/decisions/0004-experts.md).
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """Experts `expert_ids` of `num_experts`. The class marks its parameters as sharded: stacked on dim 0 by expert.

    dim and ffn_dim must be multiples of 8: grouped products want rows that are aligned to 16 bytes, bf16 included.
    """

    def __init__(self, dim: int, ffn_dim: int, num_experts: int, expert_ids: range | None = None) -> None:
        super().__init__()
        if dim % 8 or ffn_dim % 8:
            raise ValueError(f"dim is {dim} and ffn_dim is {ffn_dim}, allowed: multiples of 8")
        self.num_experts = num_experts
        self.expert_ids = range(num_experts) if expert_ids is None else expert_ids
        self.w_in_eDF = nn.Parameter(torch.empty(len(self.expert_ids), dim, ffn_dim))
        self.w_out_eFD = nn.Parameter(torch.empty(len(self.expert_ids), ffn_dim, dim))

    def forward(self, rows_RD: Tensor, counts_e: Tensor | None) -> Tensor:
        """rows_RD is grouped by local expert, counts_e rows for each; None: the same number for every expert.

        Computes in the dtype of the rows, which the stream has chosen."""
        w_in_eDF, w_out_eFD = self.w_in_eDF.to(rows_RD.dtype), self.w_out_eFD.to(rows_RD.dtype)
        if counts_e is None:
            rows_eCD = rows_RD.view(len(self.expert_ids), -1, rows_RD.shape[1])
            return F.gelu(rows_eCD @ w_in_eDF).matmul(w_out_eFD).view_as(rows_RD)
        return _grouped(F.gelu(_grouped(rows_RD, w_in_eDF, counts_e)), w_out_eFD, counts_e)

    @torch.no_grad()
    def init_weights(self, key: str, std_in: float, std_out: float) -> None:
        """Normal weights that depend on (key, tensor, global expert id) alone: not on the EP degree, nor on what else was
        drawn before, and the global generator is left as it was."""
        for name, weight, std in (("w_in", self.w_in_eDF, std_in), ("w_out", self.w_out_eFD, std_out)):
            for expert, w in zip(self.expert_ids, weight, strict=True):
                digest = hashlib.blake2b(f"{key}/{name}/{expert}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
                w.copy_(torch.randn(w.shape, generator=generator) * std)


def _grouped(rows_RD: Tensor, weight_eDF: Tensor, counts_e: Tensor) -> Tensor:
    """rows of group i times weight i."""
    if rows_RD.dtype == torch.float64:  # grouped_mm has no float64
        groups = rows_RD.split(counts_e.tolist())
        return torch.cat([rows @ w for rows, w in zip(groups, weight_eDF.unbind(), strict=True)])
    return F.grouped_mm(rows_RD, weight_eDF, offs=counts_e.cumsum(0).to(torch.int32))
