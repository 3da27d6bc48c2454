"""transformers before it had an EPImplementationInterface (5.16, 5.17), for `scmoe conform`.

Its expert parallelism was a plan of tensor parallelism: all ranks have the same tokens, each
computes its own experts, and outputs are summed. There are three ways to compute experts.
"""

from functools import partial

import torch

from scmoe.conform.adapter import Adapter, Group, NotAsked
from scmoe.conform.of_transformers import adapter_of
from scmoe.conform.plain import Weights


def make(group: Group, weights: Weights, dtype: torch.dtype, experts: str) -> Adapter:
    from transformers.distributed import DistributedConfig

    if group.ep_size < group.size:
        raise NotAsked("these releases join expert parallelism and FSDP in no way")
    config = DistributedConfig(tp_size=group.size, enable_expert_parallel=True)
    options = {"distributed_config": config, "experts_implementation": experts}
    return adapter_of(group, weights, dtype, options, shares_tokens=True)


eager = partial(make, experts="eager")
batched_mm = partial(make, experts="batched_mm")
grouped_mm = partial(make, experts="grouped_mm")
