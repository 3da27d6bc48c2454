"""A LightningModule of your own with an expert-parallel MoE layer: `python
docs/examples/expert_parallel.py`."""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

import scmoe


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.wire = scmoe.Wire()  # for one process; the Strategy replaces it

    def configure_model(self):
        if not hasattr(self, "moe"):
            self.moe = scmoe.MoE(64, num_experts=8, top_k=2, group=self.wire)

    def training_step(self, batch, batch_idx):
        x, y = batch
        out, stats = self.moe(x)
        loss = F.mse_loss(out, y)
        self.log("loss", loss, sync_dist=True)
        return loss + 0.01 * scmoe.load_balance_loss([stats], self.wire)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    seed_everything(1)
    x = torch.randn(256, 16, 64)
    loader = DataLoader(TensorDataset(x, x.roll(1, -1)), batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        # all ranks share the experts; ep_size=... for fewer
        strategy=scmoe.ExpertParallelStrategy(),
        max_steps=20,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Regression(), loader)
    if trainer.is_global_zero:
        print(
            f"loss after {trainer.global_step} steps: {trainer.callback_metrics['loss'].item():.6f}"
        )
