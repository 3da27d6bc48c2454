import torch

import scmoe


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = scmoe.ScMoEBlock(
            dim=64, heads=4, num_experts=8, top_k=1, position="pos2", combine="cg1"
        )

    def forward(self, x):
        y, stats = self.block(x)
        return y, scmoe.load_balance_loss([stats])


torch.manual_seed(1)
model, x = Model(), torch.randn(8, 16, 64)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(20):
    y, balance = model(x)
    loss = (y - x.cumsum(1) / 4).square().mean() + 0.01 * balance
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss after 20 steps: {loss.item():.3f}")
