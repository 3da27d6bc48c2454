"""`scmoe.MoE` in plain torch, for `scmoe conform docs/examples/conform/own.py:make`."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import scmoe
from scmoe.api import wire_of
from scmoe.conform.adapter import RATE, Adapter, NotAsked, Packed
from scmoe.conform.plain import DIM, EXPERTS, TOP_K, WIDTH, Plain
from scmoe.moe.layout import Buffers, Capacity
from scmoe.parallel.update.guard import clip_grad_norm
from scmoe.parallel.wire.dispatchers import make_dispatcher

NAMES = {"w_in": Packed("gate", "up", transposed=True), "w_out": Packed("down", transposed=True)}
FILLED = Capacity(EXPERTS / TOP_K, filled=True)  # room for all of a rank's copies
PLAIN = {  # the formula of each router
    "softmax": Plain(),
    "deepseek": Plain(score="sigmoid"),
    "longcat": Plain(normalise=False),
}


class Layer(nn.Module):
    """A dense projection and the mixture of experts behind it, with these weights."""

    def __init__(self, weights, dtype, group, **options):
        super().__init__()
        self.recompute = False
        self.projection = nn.Linear(DIM, DIM, bias=False)
        self.moe = scmoe.MoE(
            DIM, EXPERTS, TOP_K, ffn_dim=WIDTH, activation="swiglu", group=group, **options
        )
        self.to(dtype)

        self.ids = self.moe.experts.expert_ids
        self.moe.experts.register_forward_hook(self.note_rows)
        with torch.no_grad():
            self.projection.weight.copy_(weights.projection)
            self.moe.router.gate.weight.copy_(weights.router)
            self.moe.experts.w_in_eDF.copy_(NAMES["w_in"].stack(weights.experts, self.ids))
            self.moe.experts.w_out_eFD.copy_(NAMES["w_out"].stack(weights.experts, self.ids))

    def note_rows(self, experts, arguments, output):
        self.num_rows = len(output)

    def forward(self, x, mask=None):
        x = self.projection(x)
        if self.recompute:
            return checkpoint(self.moe, x, mask, use_reentrant=False)
        return self.moe(x, mask)


def hooks(layer, whole=lambda tensor: tensor):
    """Return the hooks that need the layer alone. whole: gathers a tensor that is split."""
    moe = layer.moe

    def experts(read):
        w_in, w_out = whole(read(moe.experts.w_in_eDF)), whole(read(moe.experts.w_out_eFD))
        return {i: {"w_in": w_in[n], "w_out": w_out[n]} for n, i in enumerate(layer.ids)}

    def dense(read):
        weights = {"projection": layer.projection.weight, "router": moe.router.gate.weight}
        if moe.router.bias is not None:
            weights["bias"] = moe.router.bias.weight
        return {name: whole(read(weight)) for name, weight in weights.items()}

    return {
        "experts": experts,
        "dense": dense,
        "freeze": lambda: moe.experts.requires_grad_(False),
        # of the fair share: as many copies of each expert as a rank has tokens
        "capacity": lambda slots: moe.arrange_as(Capacity(EXPERTS / TOP_K)),
        "rows": lambda: layer.num_rows,
        "recompute": lambda: setattr(layer, "recompute", True),
        "names": NAMES,
    }


def balance_of_all(stats, group):
    """Return the balance loss of all ranks' tokens, of which each rank computes a share."""
    loss = scmoe.load_balance_loss([stats], group).detach()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def refuse_unequal(x):
    """With rows of a fixed number, training needs as many tokens on every rank."""
    extremes = torch.tensor([len(x), -len(x)])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum() != 0:
        raise NotAsked("a capacity needs as many tokens on every rank")


def make(group, weights, dtype, plain=PLAIN["softmax"], rows=None, **options):
    if group.ep_size < group.size:
        raise NotAsked("scmoe.data_parallel has one group; strategy.py has both")
    layer = Layer(weights, dtype, group.ep, **options)
    if rows is not None:
        layer.moe.arrange_as(rows)
        buffered = isinstance(rows, Buffers)
        layer.moe.dispatcher = make_dispatcher(wire_of(group.ep), EXPERTS, buffered=buffered)
    model = scmoe.data_parallel(layer, group.ep)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    last = []

    def forward(x, mask=None):
        if rows is not None:
            refuse_unequal(x)
        y, stats = model(x, mask)
        last[:] = [stats]
        return y

    own = hooks(layer)
    of_sequences = layer.moe.router.scoring.per_sequence
    if rows is not None and rows != FILLED:
        own["rows"] = None  # their number is fixed
    if isinstance(rows, Buffers):
        own["capacity"] = None  # of ranks, not of experts

    def clip(limit):
        shards = {*layer.moe.experts.parameters()}
        return clip_grad_norm(model.parameters(), shards, limit, wire_of(group.ep).mesh)

    def step():
        optimizer.step()
        scmoe.move_biases(model, last, group.ep)
        optimizer.zero_grad()

    return Adapter(
        forward=forward,
        masked=forward,
        no_sync=model.no_sync,
        clip=clip,
        step=step,
        # DeepSeek's is that of each sequence: the ranks' tokens are not one
        balance=None if of_sequences else lambda: balance_of_all(last[0], group.ep),
        plain=plain,
        **own,
    )


# other routers and row layouts
deepseek = partial(make, router="deepseek", plain=PLAIN["deepseek"])
longcat = partial(make, router="longcat", plain=PLAIN["longcat"])
slots = partial(make, rows=Capacity(EXPERTS / TOP_K))
filled = partial(make, rows=FILLED)
buffers = partial(make, rows=Buffers(EXPERTS / TOP_K))
