"""A plain LightningModule with an expert-parallel MoE layer: `python docs/examples/expert_parallel.py`, or torchrun."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router
from scmoe.moe.stream import MoEStream
from scmoe.parallel.mesh import ParallelContext


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.parallel_context = ParallelContext()  # for one process; the Strategy replaces it

    def configure_model(self):
        if hasattr(self, "moe"):
            return
        context = self.parallel_context
        router = Router(64, num_experts=8, top_k=2)
        experts = Experts(64, 256, 8, context.local_experts(8))
        experts.init_weights("moe", 0.1, 0.1)  # by global expert id: the same for every EP degree
        self.moe = MoEStream(router, experts, context.dispatcher(8))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out, stats = self.moe(x)
        sums = self.parallel_context.sum_over_ranks(integer_sums([stats]))
        balance = load_balance_loss([stats], sums, self.parallel_context.world_size)
        loss = F.mse_loss(out, y)
        self.log("loss", loss, sync_dist=True)
        return loss + 0.01 * balance

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    seed_everything(1)
    x = torch.randn(256, 16, 64)
    loader = DataLoader(TensorDataset(x, x.roll(1, -1)), batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="expert_parallel",  # known since scmoe is imported; ExpertParallelStrategy(ep_size=...) for fewer
        max_steps=20,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Regression(), loader)
    if trainer.is_global_zero:
        print(f"loss after {trainer.global_step} steps: {trainer.callback_metrics['loss'].item():.6f}")
