"""The drop-in block on two CPU ranks: `torchrun --standalone --nproc-per-node=2
docs/examples/two_ranks.py`."""

import torch
import torch.distributed as dist
from torch import nn

import scmoe

dist.init_process_group("gloo")
ranks = dist.group.WORLD
torch.manual_seed(1)  # the same weights on every rank
block = scmoe.ScMoEBlock(
    dim=64, heads=4, num_experts=8, group=ranks
)  # each rank holds four experts
model = scmoe.data_parallel(
    block, ranks
)  # DDP; gradients of experts come from both ranks' tokens already
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x = torch.randn(
    8, 16, 64, generator=torch.Generator().manual_seed(dist.get_rank())
)  # each rank has its own batch
for step in range(20):
    y, stats = model(x)
    loss = nn.functional.mse_loss(y, x.cumsum(1) / 4)
    optimizer.zero_grad()
    (loss + 0.01 * scmoe.load_balance_loss([stats], ranks)).backward()
    optimizer.step()
    if step % 19 == 0:
        print(f"rank {dist.get_rank()}, step {step}: loss {loss.item():.3f}")
dist.destroy_process_group()
