"""st-moe-pytorch's MoE under DistributedDataParallel, for `scmoe conform`.

Every rank has the weights of all experts and computes with its own share. The layer has biases and
a gate that conform's formulas lack, so one process is the measure. Thresholds are 0 and the
capacity is large: otherwise the layer drops copies at random.
"""

import torch
from st_moe_pytorch import MoE
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scmoe.conform.adapter import RATE, Adapter, ByExpert, ByName, Group, NotAsked, Packed, Read
from scmoe.conform.plain import DIM, EXPERTS, TOP_K, Weights

ST_MOE_WEIGHTS = {"net.0.weight": Packed("up", "gate"), "net.2.weight": Packed("down")}
WIDTH_RATIO = 2.25  # 24 hidden features of 16


class StMoeLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(DIM, DIM, bias=False)
        self.moe = MoE(
            DIM,
            EXPERTS,
            WIDTH_RATIO,
            threshold_train=0.0,
            capacity_factor_train=float(EXPERTS),
            gating_top_n=TOP_K,
            allow_var_seq_len=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.projection(x)[None])[0][0]


def make(group: Group, weights: Weights, dtype: torch.dtype) -> Adapter:
    if group.ep_size < group.size:
        raise NotAsked("the layer shares its experts among all ranks")
    layer = StMoeLayer().to(dtype)
    all_experts = layer.moe.experts.experts
    with torch.no_grad():
        layer.projection.weight.copy_(weights.projection)
        layer.moe.gate.to_gates.weight.copy_(weights.router)
        for i, expert in enumerate(all_experts):
            for name, stored in ST_MOE_WEIGHTS.items():
                expert.get_parameter(name).copy_(stored.join(weights.experts[i]))
    model = DistributedDataParallel(layer, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), RATE)

    def experts(read: Read) -> ByExpert:
        ids = group.experts(EXPERTS)
        return {i: {n: read(p) for n, p in all_experts[i].named_parameters()} for i in ids}

    def dense(read: Read) -> ByName:
        gate = layer.moe.gate.to_gates.weight
        return {"projection": read(layer.projection.weight), "router": read(gate)}

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return Adapter(
        forward=model,
        experts=experts,
        dense=dense,
        no_sync=model.no_sync,
        step=step,
        freeze=lambda: all_experts.requires_grad_(False),
        names=ST_MOE_WEIGHTS,
    )
