"""An expert-parallel layer in plain torch with every hook, and what is made of it by one mistake.

`make` is right. Each function in WRONG has the mistake of its name, which `tests/conform` looks
for. It stands for a stranger's code, so it imports nothing of this project's layers.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scmoe.conform.adapter import RATE, Adapter, LowRank
from scmoe.conform.plain import EXPERTS, TOP_K, Plain

HANG_S = 600
NOISE = 1e-14
WRONG = {  # mistake: the questions that it fails
    "output shifted": ["outputs"],
    "input gradient doubled": ["input gradients"],
    "dense gradients not reduced": ["dense gradients"],
    "router gradients not reduced": ["router gradients"],
    "router detached": ["input gradients", "dense gradients", "router gradients"],
    "expert gradients not divided": ["expert gradients"],
    "norm averaged": ["gradient norm"],
    "experts not clipped": ["clipping"],
    "experts not stepped": ["optimizer step"],
    "reduced at each batch": ["accumulation"],
    "frozen experts detached": ["frozen experts"],
    "losses weighted by tokens": ["unequal tokens"],
    "skips what is empty": ["no tokens on a rank"],
    "a hidden capacity": ["all tokens to one expert"],
    "divided by no tokens": ["an expert without tokens"],
    "padding is routed": ["padding has no effect"],
    "padding takes slots": ["padding takes no capacity"],
    "padding is sent": ["padding takes no rows"],
    "strides ignored": ["non-contiguous input"],
    "recompute counts twice": ["recompute"],
    "random bits": ["the same twice"],
    "balance of own tokens": ["balance loss", "replicas after steps"],
    "bias of own tokens": ["router bias", "replicas after steps"],
    "replicas drift": ["replicas after steps"],
    "non-finite ignored": ["a non-finite value on a rank"],
    "low-rank gradients not divided": ["LoRA on experts"],
    "one rank's experts saved": ["checkpoint on other ranks"],
    "waits for a rank that is gone": ["a rank that raises"],
}


class AllToAll(torch.autograd.Function):
    """Rows to other ranks; backward sends their gradients back."""

    @staticmethod
    def forward(ctx, rows, group, sent, received):
        ctx.reverse = group, received, sent
        return exchange(rows, group, sent, received)

    @staticmethod
    def backward(ctx, gradient):
        return exchange(gradient, *ctx.reverse), None, None, None


def exchange(rows, group, sent, received):
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def leaf(tensor):
    return tensor.clone().requires_grad_()


class Layer:
    def __init__(self, group, weights, wrong):
        self.group, self.wrong = group, wrong
        self.projection, self.router = leaf(weights.projection), leaf(weights.router)
        self.bias = torch.zeros(EXPERTS, dtype=self.router.dtype)
        self.ids = group.experts(EXPERTS)
        self.experts = {i: {n: leaf(p) for n, p in weights.experts[i].items()} for i in self.ids}
        self.low_rank: dict[int, LowRank] = {}
        self.slots: int | None = None
        self.recompute, self.sync = False, True

    # -------------------------------------------------------------- forward

    def forward(self, x, mask=None):
        if self.wrong == "skips what is empty" and len(x) == 0:
            return x
        if self.wrong == "strides ignored":
            x = torch.as_strided(x, x.shape, (x.shape[1], 1))
        if self.wrong == "input gradient doubled":
            x = ScaledGradient.apply(x, 2.0)
        mask = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
        x = x @ self.projection.T
        y = (
            checkpoint(self.moe, x, mask, use_reentrant=False)
            if self.recompute
            else self.moe(x, mask)
        )
        if self.wrong == "output shifted":
            y = y + 0.01 * y.detach()
        if self.wrong == "random bits":
            y = y + NOISE * torch.rand_like(y) * (time.monotonic_ns() % 97 + 1)
        return y

    def moe(self, x, mask):
        scores = (x @ self.router.T).softmax(-1)
        self.scores = scores.detach()
        ids = (scores.detach() + self.bias).topk(TOP_K).indices
        weights = scores.gather(-1, ids)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.wrong == "router detached":
            weights = weights.detach()
        self.counts = F.one_hot(ids[mask].flatten(), EXPERTS).sum(0)

        tokens, slots = self.kept(ids, mask)
        chosen = ids[tokens, slots]
        order = chosen.argsort(stable=True)
        tokens, slots, chosen = tokens[order], slots[order], chosen[order]
        group, share = self.group, EXPERTS // self.group.ep_size
        sent = torch.bincount(chosen // share, minlength=group.ep_size).tolist()
        received = exchange(torch.tensor(sent), group.ep, [1] * group.ep_size, [1] * group.ep_size)
        received = received.tolist()
        rows = AllToAll.apply(x[tokens], group.ep, sent, received)
        out = self.computed(rows, exchange(chosen, group.ep, sent, received))
        back = AllToAll.apply(out, group.ep, received, sent)
        weighted = back * weights[tokens, slots, None]
        if self.wrong == "padding is sent":
            weighted = weighted * mask[tokens, None]
        return torch.zeros_like(x).index_add(0, tokens, weighted)

    def kept(self, ids, mask):
        """Return the token and the slot of each copy that is sent."""
        if self.wrong in ("padding is sent", "padding is routed"):
            mask = torch.ones_like(mask)
        limit = self.slots
        if self.wrong == "a hidden capacity":
            limit = int(0.9 * len(ids))
        keep = mask[:, None].expand_as(ids)
        if limit is not None:
            takes = torch.ones_like(mask) if self.wrong == "padding takes slots" else mask
            one_hot = F.one_hot(ids, EXPERTS) * takes[:, None, None]
            places = one_hot.flatten(0, 1).cumsum(0).view_as(one_hot).gather(-1, ids[..., None])
            keep = keep & (places[..., 0] <= limit)
        return keep.nonzero().unbind(1)

    def computed(self, rows, chosen):
        self.num_rows = len(rows)
        out = torch.zeros_like(rows)
        for i in self.ids:
            expert = self.experts[i]
            up = expert["up"]
            if i in self.low_rank:
                up = up + self.low_rank[i].b @ self.low_rank[i].a
            mine = (chosen == i).nonzero()[:, 0]
            hidden = F.silu(rows[mine] @ expert["gate"].T) * (rows[mine] @ up.T)
            y = hidden @ expert["down"].T
            if self.wrong == "frozen experts detached" and not expert["up"].requires_grad:
                y = y.detach()
            out = out.index_add(0, mine, y)
        return out + 0 * rows  # joins rows that no expert has to the graph

    # -------------------------------------------------------------- parameters and gradients

    def of_experts(self):
        own = [p for expert in self.experts.values() for p in expert.values()]
        return own + [p for pair in self.low_rank.values() for p in pair]

    def named(self, read):
        experts = {i: {n: read(p) for n, p in own.items()} for i, own in self.experts.items()}
        for i, pair in self.low_rank.items():
            experts[i] |= {"up_a": read(pair.a), "up_b": read(pair.b)}
        return experts

    def dense(self, read):
        named = {"projection": self.projection, "router": self.router, "bias": self.bias}
        return {name: read(p) for name, p in named.items()}

    def backward(self, loss):
        if self.wrong == "losses weighted by tokens":
            tokens = torch.tensor(float(len(self.scores)))
            mean = tokens.clone()
            dist.all_reduce(mean)
            loss = loss * (tokens / (mean / self.group.size)).item()
        loss.backward()
        if self.sync or self.wrong == "reduced at each batch":
            self.reduce()

    def reduce(self):
        left_out = {
            "dense gradients not reduced": self.projection,
            "router gradients not reduced": self.router,
        }.get(self.wrong)
        for p in (self.projection, self.router):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if p is not left_out:
                dist.all_reduce(p.grad)
                p.grad /= self.group.size
        for i, tensors in self.experts.items():
            of_lora = [*self.low_rank[i]] if i in self.low_rank else []
            for p in (*tensors.values(), *of_lora):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=self.group.edp)
                p.grad /= self.group.size
                if self.wrong == "expert gradients not divided":
                    p.grad *= self.group.size
                if self.wrong == "recompute counts twice" and self.recompute:
                    p.grad *= 2
                if self.wrong == "low-rank gradients not divided" and p in set(of_lora):
                    p.grad *= self.group.size
                if self.wrong == "divided by no tokens":
                    p.grad *= p.grad.abs().sum() / p.grad.abs().sum()

    @contextmanager
    def no_sync(self):
        self.sync = False
        yield
        self.sync = True

    # -------------------------------------------------------------- update

    def clip(self, limit):
        def square(parameters):
            return sum(p.grad.square().sum() for p in parameters)

        dense, experts = square([self.projection, self.router]), square(self.of_experts())
        if self.wrong == "norm averaged":
            norm = (dense + experts).sqrt()
            dist.all_reduce(norm)
            norm /= self.group.size
        else:
            dist.all_reduce(experts, group=self.group.ep)
            norm = (dense + experts).sqrt()
        if self.wrong == "non-finite ignored":
            norm = norm.nan_to_num(1.0)
        clipped = [self.projection, self.router]
        clipped += [] if self.wrong == "experts not clipped" else self.of_experts()
        for p in clipped:
            p.grad *= min(1.0, limit / norm)
        return norm

    @torch.no_grad()
    def step(self):
        last = self.group.rank == self.group.size - 1
        trained = [self.projection, self.router]
        trained += [] if self.wrong == "experts not stepped" and last else self.of_experts()
        for p in trained:
            p -= RATE * p.grad
        for p in (self.projection, self.router, *self.of_experts()):
            p.grad = None
        if self.wrong == "replicas drift":
            self.projection += NOISE * self.group.rank
        counts = self.counts.clone()
        if self.wrong != "bias of own tokens":
            dist.all_reduce(counts)
        self.bias += 0.01 * torch.sign(counts.double().mean() - counts)

    def balance(self):
        counts, scores = self.counts.double(), self.scores.double().sum(0)
        if self.wrong != "balance of own tokens":
            dist.all_reduce(counts)
            dist.all_reduce(scores)
        return EXPERTS * (counts / counts.sum() * scores / scores.sum()).sum()

    # -------------------------------------------------------------- other hooks

    def freeze(self):
        for p in self.of_experts():
            p.requires_grad_(False)

    def save(self, folder):
        if self.group.rank == 0:
            torch.save(self.dense(Tensor.detach), Path(folder, "dense.pt"))
        savers = 1 if self.wrong == "one rank's experts saved" else self.group.ep_size
        if self.group.rank < savers:
            for i, expert in self.named(Tensor.detach).items():
                torch.save(expert, Path(folder, f"{i}.pt"))
        dist.barrier()

    @torch.no_grad()
    def load(self, folder):
        for name, tensor in torch.load(Path(folder, "dense.pt")).items():
            vars(self)[name].copy_(tensor)
        for i, expert in self.experts.items():
            if Path(folder, f"{i}.pt").exists():
                for name, tensor in torch.load(Path(folder, f"{i}.pt")).items():
                    expert[name].copy_(tensor)

    def lora(self, factors):
        self.low_rank = {i: LowRank(*map(leaf, factors[i])) for i in self.ids}


def make(group, weights, dtype, wrong=""):
    layer = Layer(group, weights, wrong)

    def forward(x, mask=None):
        if wrong == "raises on a rank" and group.rank == 1:
            raise KeyError("the reason")
        try:
            return layer.forward(x, mask)
        except RuntimeError:
            if wrong == "waits for a rank that is gone":
                time.sleep(HANG_S)
            raise

    return Adapter(
        forward=forward,
        masked=forward,
        experts=layer.named,
        dense=layer.dense,
        backward=layer.backward,
        no_sync=layer.no_sync,
        clip=layer.clip,
        step=layer.step,
        freeze=layer.freeze,
        capacity=lambda slots: setattr(layer, "slots", slots),
        rows=lambda: layer.num_rows,
        recompute=lambda: setattr(layer, "recompute", True),
        balance=layer.balance,
        lora=layer.lora,
        save=layer.save,
        load=layer.load,
        plain=Plain(),
    )


def shared(group, weights, dtype):
    """The right layer where all ranks of an EP group have the same tokens: each computes a part of
    them, and outputs and gradients are summed."""
    layer = Layer(group, weights, "")

    def forward(x):
        part = Summed.apply(x, group.ep).tensor_split(group.ep_size)[group.ep_rank]
        y = layer.forward(part)
        return Gathered.apply(y, group.ep)

    def backward(loss):
        loss.backward()
        layer.reduce()
        for p in [layer.projection, layer.router, *layer.of_experts()]:
            p.grad *= group.ep_size

    return Adapter(
        forward=forward,
        backward=backward,
        experts=layer.named,
        dense=layer.dense,
        shares_tokens=True,
        clip=layer.clip,
        plain=Plain(),
    )


class Summed(torch.autograd.Function):
    """The same tokens on all ranks; backward adds up the gradients of their parts."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Gathered(torch.autograd.Function):
    """Equal parts of all ranks, joined; backward takes this rank's."""

    @staticmethod
    def forward(ctx, part, group):
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return gradient.tensor_split(size)[rank], None


def pair(group, detached=False):
    """A dispatch and a combine without experts."""
    share = EXPERTS // group.ep_size

    def dispatch(x, ids):
        order = ids.flatten().argsort(stable=True)
        sent = torch.bincount(ids.flatten() // share, minlength=group.ep_size)
        received = exchange(sent, group.ep, [1] * group.ep_size, [1] * group.ep_size)
        sizes = sent.tolist(), received.tolist()
        return AllToAll.apply(x[order // TOP_K], group.ep, *sizes), (order, sizes)

    def combine(rows, weights, state):
        order, (sent, received) = state
        back = AllToAll.apply(rows, group.ep, received, sent)
        weights = (weights.detach() if detached else weights).flatten()[order, None]
        return torch.zeros(len(order) // TOP_K, rows.shape[1], dtype=rows.dtype).index_add(
            0, order // TOP_K, back * weights
        )

    return dispatch, combine


detached_pair = partial(pair, detached=True)
globals().update(
    {mistake: partial(make, wrong=mistake) for mistake in [*WRONG, "raises on a rank"]}
)
