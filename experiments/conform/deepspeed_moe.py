"""DeepSpeed's MoE layer under its engine, for `scmoe conform`.

The engine is that of ZeRO stage 0 without mixed precision, and clips by `clip_grad_norm_`, as its
step does. DeepSpeed's gate computes in float32, so conform asks with --dtype float32.
"""

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor, nn

from scmoe.conform.adapter import RATE, Adapter, ByExpert, ByName, Group, Read
from scmoe.conform.plain import DIM, EXPERTS, TOP_K, WIDTH, Plain, Weights


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, WIDTH, bias=False)
        self.up = nn.Linear(DIM, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class DeepSpeedLayer(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(DIM, DIM, bias=False)
        self.moe = MoE(
            DIM,
            Expert(),
            EXPERTS,
            ep_size,
            k=TOP_K,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(self.projection(x))[0]


def make(group: Group, weights: Weights, dtype: torch.dtype) -> Adapter:
    layer = DeepSpeedLayer(group.ep_size).to(dtype)
    local_experts = layer.moe.deepspeed_moe.experts.deepspeed_experts
    ids = group.experts(EXPERTS)
    with torch.no_grad():
        layer.projection.weight.copy_(weights.projection)
        layer.moe.deepspeed_moe.gate.wg.weight.copy_(weights.router)
        for i, expert in zip(ids, local_experts, strict=True):
            for name, tensor in weights.experts[i].items():
                expert.get_parameter(f"{name}.weight").copy_(tensor)

    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(layer.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default its step clips
    }
    engine, *_ = deepspeed.initialize(
        model=layer, optimizer=torch.optim.SGD(groups, RATE), config=config
    )

    def experts(read: Read) -> ByExpert:
        return {
            i: {name.removesuffix(".weight"): read(p) for name, p in expert.named_parameters()}
            for i, expert in zip(ids, local_experts, strict=True)
        }

    def dense(read: Read) -> ByName:
        gate = layer.moe.deepspeed_moe.gate.wg.weight
        return {"projection": read(layer.projection.weight), "router": read(gate)}

    return Adapter(
        forward=engine,
        experts=experts,
        dense=dense,
        backward=engine.backward,
        no_sync=engine.no_sync,
        clip=lambda limit: clip_grad_norm_(engine.module.parameters(), limit, mpu=engine.mpu),
        step=engine.step,
        freeze=lambda: local_experts.requires_grad_(False),
        save=lambda folder: engine.save_checkpoint(folder),
        load=lambda folder: engine.load_checkpoint(folder, load_optimizer_states=False),
        plain=Plain(),
    )
