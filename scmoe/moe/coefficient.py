"""Ways to combine the outputs of the shared expert and of the routed experts (Eq. 14-16).

    Direct Add   SE + routed
    CG-1         sigmoid(W x) SE + routed            W in R^{1 x D}
    CG-2         c_0 SE + c_1 routed,  c = softmax(W x)   W in R^{2 x D}

x is the MoE module's input: the current layer's representation, or the tap
(docs/decisions/0002-coefficient-input.md).
"""

from torch import Tensor, nn


class DirectAdd(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BSD: Tensor, shared_BSD: Tensor, routed_BSD: Tensor) -> Tensor:
        return shared_BSD + routed_BSD


class CG1(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x_BSD: Tensor, shared_BSD: Tensor, routed_BSD: Tensor) -> Tensor:
        return self.gate(x_BSD).sigmoid() * shared_BSD + routed_BSD


class CG2(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, 2, bias=False)

    def forward(self, x_BSD: Tensor, shared_BSD: Tensor, routed_BSD: Tensor) -> Tensor:
        c_BS2 = self.gate(x_BSD).softmax(-1)
        return c_BS2[..., :1] * shared_BSD + c_BS2[..., 1:] * routed_BSD


COEFFICIENT_GATES = {"direct_add": DirectAdd, "cg1": CG1, "cg2": CG2}
