"""`scmoe.MoE` under the Strategy, for `scmoe conform docs/examples/conform/strategy.py:replicated`.

A Trainer calls its module, and conform calls hooks. So `fit` runs in a greenlet, which waits for
`forward` before each step, and for `backward` inside of it.
"""

from functools import partial

import torch
from greenlet import getcurrent, greenlet
from lightning.pytorch import LightningModule, Trainer
from own import PLAIN, Layer, balance_of_all, hooks
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import scmoe
from scmoe.conform.adapter import RATE, Adapter
from scmoe.conform.plain import DIM

PRECISIONS = {torch.float64: "64-true", torch.float32: "32-true", torch.bfloat16: "bf16-true"}
STEPS = 100  # more than any question takes
running = []  # the fit of the last question


class Asked(LightningModule):
    def __init__(self, weights, dtype, **options):
        super().__init__()
        self.wire = scmoe.Wire()
        self.make_layer = partial(Layer, weights, dtype, **options)
        self.layer = None

    def configure_model(self):
        if self.layer is None:
            self.layer = self.make_layer(group=self.wire)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.request = getcurrent().parent.switch()
        optimizer_closure()

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass  # `step` does it

    def training_step(self, batch, batch_idx):
        return getcurrent().parent.switch(self.layer(*self.request))


class Fit:
    """A `fit` that takes a step for each forward and backward."""

    def __init__(self, module, group, dense, dtype, ckpt_path=None):
        self.strategy = scmoe.ExpertParallelStrategy(ep_size=group.ep_size, dense=dense)
        self.trainer = Trainer(
            accelerator="cpu",
            devices=group.size,
            strategy=self.strategy,
            precision=PRECISIONS[dtype],
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.dtype = dtype
        loader = DataLoader(torch.zeros(STEPS * group.size), batch_size=1)
        self.inside = greenlet(lambda: self.trainer.fit(module, loader, ckpt_path=ckpt_path))
        self.inside.switch()

    def forward(self, x, mask=None):
        y, self.stats = self.inside.switch((x, mask))
        return y

    def backward(self, loss):
        self.inside.switch(loss)

    def end(self):
        self.trainer.should_stop = True
        if not self.inside.dead:
            self.backward(self.forward(torch.zeros(1, DIM, dtype=self.dtype)).sum())


def make(group, weights, dtype, dense, **options):
    while running:
        running.pop().end()
    module = Asked(weights, dtype, **options)
    fit = Fit(module, group, dense, dtype)
    running.append(fit)

    def clip(limit):
        return fit.strategy.precision_plugin.clip_gradients(module.optimizers(), limit)

    def step():
        optimizer = module.optimizers().optimizer
        optimizer.step()
        scmoe.move_biases(module, [fit.stats], module.wire)
        optimizer.zero_grad()

    def save(folder):
        fit.end()
        fit.trainer.save_checkpoint(f"{folder}/last.ckpt")

    def load(folder):
        fit.end()
        Fit(module, group, dense, dtype, f"{folder}/last.ckpt")

    return Adapter(
        forward=fit.forward,
        masked=fit.forward,
        backward=fit.backward,
        no_sync=fit.strategy.block_backward_sync,
        clip=clip,
        step=step,
        balance=lambda: balance_of_all(fit.stats, module.wire),
        save=save,
        load=load,
        plain=PLAIN["softmax"],
        loss_scale=1 / group.size if dense == "sharded" else 1.0,
        **hooks(module.layer, lambda t: t.full_tensor() if isinstance(t, DTensor) else t),
    )


replicated = partial(make, dense="replicated")
sharded = partial(make, dense="sharded")
