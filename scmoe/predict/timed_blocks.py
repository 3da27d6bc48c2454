"""The seconds that a machine takes for what was counted of a model, as simulated_step.py has them.

kernel       max(FLOPs / attained rate, bytes / memory rate) + launch
fused        kernels without products that follow each other are one, which moves as many bytes as
             the largest of them; casts of weights alone are left out
weights      of a kernel's bytes, those that do not grow with rows; a rank reads 1 / EP of the
             experts', and 1 / TP of the others'
in turn      kernels that run once for each expert: a rank launches 1 / EP of them
backward     twice the kernels of forward; of what is recomputed, three times. Transfers are
             repeated too where `transfers_again`
attention    times the machine's factor
layout       route, encode, decode: their kernels, and (`moe` + k `copy`) times the experts' time
             for the rows of one copy, without weights and launches
host         the machine's fixed time of a block and batch, a third of it in forward, two in
             backward, in encode: the host waits for the numbers of rows there. Recompute does not
             repeat it. It adds as much where a stage, or a virtual one, hands a batch over to the
             next
TP           each of T ranks computes 1 / T of the rows of a batch, or of the heads and columns.
             Around attention and MLPs tokens are gathered and summed over them, in forward and
             backward each
transfer     all-to-all of the rows that dispatch gets; the same back, and in backward
sums         dense gradients over all ranks, experts' over those that hold the same ones
gathers      weights that are split, dense and experts': before a block's forward and its
             backward; their gradients are summed by a reduce-scatter, in float32
update       UPDATE_BYTES a parameter of a rank / memory rate
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from scmoe.models.model_cost import WEIGHT_BYTES
from scmoe.predict.cluster_rates import Groups, Machine
from scmoe.predict.operator_costs import OUTSIDE, Costs, Kernel, Layer, Part
from scmoe.predict.shared_link import Sum
from scmoe.predict.simulated_step import Block, Head
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.play import BEFORE, TRANSFERS
from scmoe.schedule.schedule import Schedule

BACKWARD = 2  # kernels of an operator's backward, over those of its forward
RECOMPUTED = ("attention", "mlp", "shared_expert", "experts")  # by blocks/sublayers.py
UPDATE_BYTES = 28  # AdamW in float32: it reads four numbers of a parameter, and writes three
# of the machine's factors `moe` and `copy`
MODULE_SHARE = {"route": 1 / 3, "encode": 1 / 3, "decode": 1 / 3}
COPY_SHARE = {"encode": 1 / 3, "decode": 2 / 3}


# around which tokens are gathered and summed
IN_TENSOR_PARALLEL = ("attention", "mlp", "shared_expert")


class JobSizes(NamedTuple):
    """The ranks of a job, and what travels between them.

    rows: rows of a rank over those that were counted. sent, received: bytes of a number that is
    dispatched, or combined, over those of a computed one. tensor_parallel: ranks that share each
    dense weight. once_a_node: of a token's copies one row for each node travels between nodes
    (cluster_rates.py). split: dense weights are split over all ranks. transfers_again: what is
    computed again dispatches again. stages, virtual_stages: of the pipeline, and of each
    of them; the model is a stage, with the head. missing: the share of a stage's layers that the
    last stage, which has the head, lacks.
    """

    ranks: int
    ep_size: int
    rows: float = 1.0
    sent: float = 1.0
    received: float = 1.0
    tensor_parallel: int = 1
    once_a_node: bool = False
    split: bool = False
    transfers_again: bool = False
    stages: int = 1
    virtual_stages: int = 1
    missing: float = 0.0

    @property
    def hand_overs(self) -> int:
        """Return how often a batch is handed over to the next stage."""
        return self.virtual_stages if self.stages > 1 else 0

    @property
    def sharing_dense(self) -> Groups:
        """The ranks that share each dense weight: neighbours."""
        return Groups(self.tensor_parallel, self.ranks)

    @property
    def same_dense(self) -> Groups:
        """The ranks that hold the same dense weights."""
        return Groups(self.ranks // self.tensor_parallel, self.ranks, self.tensor_parallel)

    @property
    def sharing_experts(self) -> Groups:
        """The ranks that exchange rows: neighbours."""
        return Groups(self.ep_size, self.ranks)

    @property
    def same_experts(self) -> Groups:
        """The ranks that hold the same experts."""
        return Groups(self.ranks // self.ep_size, self.ranks, self.ep_size)


def blocks_on(machine: Machine, costs: Costs, sizes: JobSizes) -> tuple[list[Block], Head]:
    """Return the blocks of a model and its head as a machine runs them, at the schedules with which
    they were counted."""
    timing = _Timing(machine, costs, sizes)
    blocks = {layer: timing.block(layer) for layer in costs.layers}
    first, *others = (blocks[layer] for layer in costs.layers)
    return [timing.with_hand_over(first), *others], timing.head([first, *others])


def reschedule(blocks: Sequence[Block], wanted: Schedule) -> list[Block]:
    """Return the blocks with a slot and chunks. Blocks of another architecture than the wanted one,
    such as those of SwinV2's last stage, keep theirs; one with a shorter window has its last
    slot. Equal blocks stay one object."""
    changed = {}
    for block in blocks:
        usual = block.schedule
        if usual.architecture == wanted.architecture:
            slot = min(wanted.slot, len(usual.window))
            schedule = replace(usual, expert_slot=slot, chunks=wanted.chunks)
            changed[block] = replace(block, schedule=schedule)
    return [changed.get(block, block) for block in blocks]


def update_seconds(machine: Machine, costs: Costs, sizes: JobSizes) -> float:
    """Return the seconds of the optimizer's update of a rank's parameters."""
    held = costs.dense_parameters / sizes.tensor_parallel + costs.expert_parameters / sizes.ep_size
    if sizes.split:
        held = (costs.dense_parameters + costs.expert_parameters) / sizes.ranks
    width = WEIGHT_BYTES[costs.job.precision] / 4
    return UPDATE_BYTES * width * held / machine.memory


def fused(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Return the kernels with each run of those without products as one."""
    merged: list[Kernel] = []
    for kernel in kernels:
        if not (kernel.flops or kernel.moved):
            continue  # a cast of weights
        last = merged[-1] if merged else None
        if last is None or last.flops or kernel.flops or kernel.for_each_expert:
            merged.append(kernel)
            continue
        moved = max(last.moved, kernel.moved)
        merged[-1] = last._replace(moved=moved, weights=last.weights + kernel.weights)
    return merged


def computing_s(times: Mapping[str, float]) -> float:
    return sum(seconds for operator, seconds in times.items() if operator not in TRANSFERS)


class _Timing(NamedTuple):
    machine: Machine
    costs: Costs
    sizes: JobSizes

    def forward(self, part: Part) -> float:
        return self.computing(part) + self.token_gathers(part)

    def computing(self, part: Part) -> float:
        factor = self.machine.attention if part.operator == "attention" else 1.0
        return factor * self.kernels(part, self.held(part)) + self.launches(part)

    def token_gathers(self, part: Part) -> float:
        """Return the seconds in which tokens are gathered before a part and summed after it, over
        the ranks that share its weights."""
        if part.operator not in IN_TENSOR_PARALLEL:
            return 0.0
        nbytes = self.costs.token_bytes * self.sizes.rows
        return 2 * self.machine.gather(nbytes, self.sizes.sharing_dense)

    def kernels(self, part: Part, weights: float) -> float:
        """Return the seconds of a part's kernels in forward. weights: the share of the weights that
        they read."""
        machine = self.machine
        rows = self.sizes.rows / self.sizes.tensor_parallel
        return sum(
            max(
                kernel.flops * rows / machine.flops,
                (kernel.moved * rows + kernel.weights * weights) / machine.memory,
            )
            for kernel in self.run_kernels(part)
        )

    def run_kernels(self, part: Part) -> Sequence[Kernel]:
        return fused(part.kernels) if self.machine.fused else part.kernels

    def backward(self, part: Part) -> float:
        times = self.times_in_backward(part)
        return self.computing(part) * times + self.token_gathers(part) * (times - 1)

    def times_in_backward(self, part: Part) -> int:
        """Return how often the kernels of a part's forward run in backward."""
        again = self.costs.job.recompute and part.operator in RECOMPUTED
        return BACKWARD + again

    def launches(self, part: Part) -> float:
        kernels = self.run_kernels(part)
        in_turn = sum(kernel.for_each_expert for kernel in kernels)
        once = len(kernels) - in_turn
        return (once + in_turn * self.held(part)) * self.machine.launch

    def held(self, part: Part) -> float:
        """Return the share of a part's weights that a rank holds."""
        if part.operator == "experts":
            return 1 / self.sizes.ep_size
        return 1 / self.sizes.tensor_parallel

    def block(self, layer: Layer) -> Block:
        """Return a block at the schedule with which it was counted."""
        runs: dict[str, list[Part]] = {BEFORE: list(layer.before)}
        for part in layer.after:
            runs.setdefault("decode" if part.operator == OUTSIDE else part.operator, []).append(
                part
            )
        # an operator that the window has twice takes equal times: of all runs, half
        times_run = {name: max(1, layer.schedule.window.count(name)) for name in runs}
        seconds: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        fixed: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
        for name, parts in runs.items():
            forward = sum(map(self.forward, parts)) / times_run[name]
            seconds["forward"][name] = forward
            seconds["backward"][name] = sum(map(self.backward, parts)) / times_run[name]
            fixed["forward"][name] = sum(map(self.launches, parts)) / times_run[name]
            launches = [self.launches(part) * self.times_in_backward(part) for part in parts]
            fixed["backward"][name] = sum(launches) / times_run[name]
        self.add_layout(seconds, runs["experts"], layer.top_k)
        for direction, thirds in (("forward", 1), ("backward", BACKWARD)):
            seconds[direction]["encode"] += thirds * self.machine.fixed / 3
            fixed[direction]["encode"] += thirds * self.machine.fixed / 3
        self.set_transfers(seconds, fixed, runs["dispatch"], layer.top_k)
        return Block(
            layer.schedule,
            OperatorTimes(**seconds),
            tuple(self.sums_of(runs, times_run)),
            OperatorTimes(**fixed),
            self.reading(runs["experts"]),
            sum(self.gather_seconds(part) for parts in runs.values() for part in parts),
        )

    def reading(self, experts: Sequence[Part]) -> OperatorTimes:
        """Return the seconds in which the experts' weights are read, as they are for every
        piece."""
        forward = backward = 0.0
        for part in experts:
            weights = sum(kernel.weights for kernel in part.kernels)
            seconds = weights * self.held(part) / self.machine.memory
            forward += seconds
            backward += seconds * self.times_in_backward(part)
        return OperatorTimes({"experts": forward}, {"experts": backward})

    def add_layout(
        self, seconds: dict[str, dict[str, float]], experts: Sequence[Part], top_k: int
    ) -> None:
        """Add what gate and layout take beyond their kernels. They read no weights of experts, so
        their measure is the time of rows alone."""
        rows_s = sum(self.kernels(part, weights=0.0) for part in experts)
        one_copy = rows_s / top_k
        for operator, share in MODULE_SHARE.items():
            more = self.machine.moe * share * one_copy
            more += self.machine.copy * top_k * COPY_SHARE.get(operator, 0.0) * one_copy
            seconds["forward"][operator] += more
            seconds["backward"][operator] += BACKWARD * more

    def set_transfers(
        self,
        seconds: dict[str, dict[str, float]],
        fixed: dict[str, dict[str, float]],
        dispatched: Sequence[Part],
        top_k: int,
    ) -> None:
        groups = self.sizes.sharing_experts
        rows_bytes = sum(part.rows_bytes for part in dispatched)
        nbytes = rows_bytes * self.sizes.rows / self.sizes.tensor_parallel
        width = {"dispatch": self.sizes.sent, "combine": self.sizes.received}
        copies = top_k if self.sizes.once_a_node else None
        latency = self.machine.all_to_all_latency(groups)
        for transfer in TRANSFERS:
            times = self.machine.all_to_all(nbytes * width[transfer], groups, copies)
            # its gradient travels as combine's rows do
            back = self.machine.all_to_all(nbytes * self.sizes.received, groups, copies)
            again = self.sizes.transfers_again and self.costs.job.recompute
            seconds["forward"][transfer] = times
            seconds["backward"][transfer] = back + (times if again else 0.0)
            fixed["forward"][transfer] = latency
            fixed["backward"][transfer] = latency * (2 if again else 1)

    def sums_of(self, runs: dict[str, list[Part]], times_run: dict[str, int]) -> list[Sum]:
        """Return the sums of a block's gradients."""
        before = runs[BEFORE]
        sums = self.sums_in_order(before, BEFORE)
        for name, parts in runs.items():
            if name == BEFORE:
                continue
            total = sum(map(self.sum_seconds, parts)) / times_run[name]
            if total:
                sums.append(Sum(total, name))
        return sums

    def sums_in_order(self, parts: Sequence[Part], operator: str) -> list[Sum]:
        """Return the sums of parts that run one after the other. Backward begins with the last."""
        total = sum(map(self.backward, parts))
        sums = []
        done = 0.0
        for part in reversed(parts):
            done += self.backward(part)
            if seconds := self.sum_seconds(part):
                sums.append(Sum(seconds, operator, done / total))
        return sums

    def sum_seconds(self, part: Part) -> float:
        width = WEIGHT_BYTES[self.costs.job.precision]
        sizes = self.sizes
        local = part.expert / sizes.ep_size
        if sizes.split:  # gathered before backward, and reduced in float32 to the part of a rank
            job = self.costs.job
            return (1 + job.wide_bytes / job.compute_bytes) * self.gather_seconds(part)
        per_rank = part.dense * width / sizes.tensor_parallel
        dense = self.machine.all_reduce(per_rank, sizes.same_dense)
        return dense + self.machine.all_reduce(local * width, sizes.same_experts)

    def gather_seconds(self, part: Part) -> float:
        """Return the seconds in which a part's weights are gathered, if they are split: dense ones
        over all ranks, experts' over those that hold the same ones."""
        if not self.sizes.split:
            return 0.0
        width = self.costs.job.compute_bytes
        dense = part.dense * width / self.sizes.tensor_parallel
        experts = part.expert * width / self.sizes.ep_size
        return self.machine.gather(dense, self.sizes.same_dense) + self.machine.gather(
            experts, self.sizes.same_experts
        )

    def head(self, stage: Sequence[Block]) -> Head:
        """Return what follows the last block, with the loss: a pass over the logits in each
        direction reads and writes them. Of a pipeline, only what makes the last stage longer than
        the others."""
        parts = self.costs.head
        logits_bytes = self.costs.logits_bytes * self.sizes.rows / self.sizes.tensor_parallel
        loss = 2 * logits_bytes / self.machine.memory
        forward = sum(map(self.forward, parts))
        backward = sum(map(self.backward, parts))
        share = backward / (backward + loss)
        sums = [
            each._replace(part=1 - share * (1 - each.part))
            for each in self.sums_in_order(parts, "head")
        ]
        forward += loss - self.sizes.missing * sum(computing_s(b.times.forward) for b in stage)
        backward += loss - self.sizes.missing * sum(computing_s(b.times.backward) for b in stage)
        return Head(max(0.0, forward), max(0.0, backward), sums)

    def with_hand_over(self, first: Block) -> Block:
        """Return a stage's first block with what the host adds where a batch is handed over."""
        host = self.sizes.hand_overs * self.machine.fixed / 3
        if not host:
            return first
        forward = {**first.times.forward, BEFORE: first.times.forward[BEFORE] + host}
        backward = {**first.times.backward, BEFORE: first.times.backward[BEFORE] + BACKWARD * host}
        return replace(first, times=OperatorTimes(forward, backward))
