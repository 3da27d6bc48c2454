"""`hf:NAME`: an expert-parallel implementation of transformers as a layer that can be asked.

NAME is one that is registered with its EPImplementationInterface; hf:FILE.py:NAME imports a file
that registers it. What is asked is a tiny OLMoE with one layer, made here, and loaded by
`from_pretrained` with a DistributedConfig as a user would. Each token is a sequence of its own, so
that attention joins no tokens. A token's output is its logits, of which there are as many as its
width. There is no plain formula: one process with the same model is the measure.

An implementation that needs a shared batch has tensor parallelism of the group's size, by the plan
of the model; any other one has FSDP2 over all ranks, each with tokens of its own.
"""

import shutil
import tempfile
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from scmoe.conform.adapter import RATE, Adapter, ByExpert, ByName, Group, NotAsked, Packed, Read
from scmoe.conform.plain import DIM, EXPERTS, TOP_K, WIDTH, Weights

TRANSFORMERS_WEIGHTS = {"gate_up": Packed("gate", "up"), "down": Packed("down")}
ATTENTION_SCALE = 0.1  # of attention's output, so that tokens keep their experts


def make(name: str, group: Group, weights: Weights, dtype: torch.dtype) -> Adapter:
    """Return the tiny model with the implementation of this name."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import EPImplementationInterface

    implementations: Any = EPImplementationInterface()
    if name not in implementations:
        raise NotAsked(f"transformers has no {name!r}, but {', '.join(implementations)}")
    shares_tokens = implementations[name].needs_shared_batch
    ep_size = group.ep_size
    sizes: dict[str, Any] = {"fsdp_size": group.size}
    if shares_tokens:
        sizes = {"tp_size": ep_size, "fsdp_size": group.size // ep_size}
    config = DistributedConfig(ep_size=ep_size, ep_implementation=name, **sizes)
    return adapter_of(group, weights, dtype, {"distributed_config": config}, shares_tokens)


def adapter_of(
    group: Group, weights: Weights, dtype: torch.dtype, options: dict[str, Any], shares_tokens: bool
) -> Adapter:
    """Return the tiny model, loaded with these options of `from_pretrained`; in one process without
    its distributed_config."""
    if group.size == 1:
        options = {k: v for k, v in options.items() if k != "distributed_config"}
    with shared_folder() as folder:
        if group.rank == 0:
            whole_model(weights).save_pretrained(folder)
        dist.barrier()
        model = load(folder, dtype, options)

    def forward(x_TD: Tensor) -> Tensor:
        if len(x_TD) == 0:
            raise NotAsked("OLMoE's attention takes no empty batch")
        return model(inputs_embeds=x_TD[:, None]).logits[:, 0]

    def experts(read: Read) -> ByExpert:
        held = moe_of(model).experts
        gate_up, down = whole(read(held.gate_up_proj)), whole(read(held.down_proj))
        return {i: {"gate_up": gate_up[i], "down": down[i]} for i in range(EXPERTS)}

    def dense(read: Read) -> ByName:
        named = {name: p for name, p in model.named_parameters() if ".experts." not in name}
        return {
            "router" if name.endswith("mlp.gate.weight") else name: whole(read(p))
            for name, p in named.items()
        }

    @contextmanager
    def no_sync() -> Any:
        split = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in split:
            module.set_requires_gradient_sync(False)
        yield
        for module in split:
            module.set_requires_gradient_sync(True)

    def step() -> None:
        optimizer = torch.optim.SGD(model.parameters(), RATE, foreach=False)
        optimizer.step()
        optimizer.zero_grad()

    def reload(folder: str) -> None:
        nonlocal model
        model = load(folder, dtype, options)

    return Adapter(
        forward=forward,
        experts=experts,
        dense=dense,
        no_sync=no_sync,
        step=step,
        freeze=lambda: moe_of(model).experts.requires_grad_(False),
        recompute=lambda: model.gradient_checkpointing_enable(),
        save=lambda folder: model.save_pretrained(folder),
        load=reload,
        names=TRANSFORMERS_WEIGHTS,
        shares_tokens=shares_tokens,
    )


def load(folder: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Return the model of a folder. torch has no grouped product of float64, so experts are then
    computed one by one."""
    from transformers import OlmoeForCausalLM

    default = "eager" if dtype == torch.float64 else "grouped_mm"
    options = {"experts_implementation": default} | options
    return OlmoeForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def whole_model(weights: Weights) -> Any:
    """Return the model in one process with these weights. Its other weights are drawn."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=DIM,
        hidden_size=DIM,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        initializer_range=DIM**-0.5,
    )
    torch.manual_seed(0)
    model: Any = OlmoeForCausalLM(config)
    model.to(weights.router.dtype)
    moe = moe_of(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(ATTENTION_SCALE)
        moe.gate.weight.copy_(weights.router)
        moe.experts.gate_up_proj.copy_(
            TRANSFORMERS_WEIGHTS["gate_up"].stack(weights.experts, range(EXPERTS))
        )
        moe.experts.down_proj.copy_(
            TRANSFORMERS_WEIGHTS["down"].stack(weights.experts, range(EXPERTS))
        )
    return model


def moe_of(model: Any) -> Any:
    return model.model.layers[0].mlp


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def shared_folder() -> Any:
    """A folder of all ranks, which rank 0 makes and removes."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    yield folder[0]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
