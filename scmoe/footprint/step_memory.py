"""The most that is in memory at one time of a training step, beside weights and AdamW's moments.

Backward goes from the last block to the first. While it is in a block there are: what this block and all before it have
kept, half of its own in the middle; gradients of the residual stream; the largest of its parts, computed again if
activations are checkpointed, with the gradients inside it; the gradient of one weight before it is added; and

    replicated    all dense gradients (DDP's buckets), and the experts' gradients of this block and all after it; those
                  in full buckets twice, where other ranks hold the same experts: they are averaged when backward ends
    split         all weights outside blocks; this block's weights, whole, and a part of their gradients; those of the
                  block before it, which are gathered meanwhile; what the block after it has given to the reduce-
                  scatter; or, when the block is done, its gradients, and what it gives to the reduce-scatter

If a step has several batches, a batch begins with the gradients of those before it. At the loss there are the gradients
of log-probabilities and logits, and at the end of forward autocast's narrow copies of all weights. The largest of these
moments counts.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from scmoe.footprint.model_cost import COMPUTE_BYTES, own_moe_uses
from scmoe.footprint.split import Split
from scmoe.footprint.stages import Stage

BUCKET = 25 * 2**20  # bytes, of parallel/update/reducer.py


def step_peak(split: Split, stages: Sequence[Stage], samples: int, recompute: bool, accumulates: bool) -> float:
    """Return bytes on rank 0. samples: of one rank in one batch. accumulates: a step has several batches, so a batch
    begins with the gradients of those before it."""
    moments = moments_replicated if split.dense == "replicated" else moments_split
    return max(moments(split, stages, samples, recompute, accumulates))


def moments_replicated(
    split: Split, stages: Sequence[Stage], samples: int, recompute: bool, accumulates: bool
) -> Iterator[float]:
    alone = split.ep_size * split.dp_size == 1
    sizes = [split.held(p) * split.width for p in split.model.parameters() if p not in split.experts]
    buckets = 0 if alone else sum(sizes)
    copies = [narrow_copies(split, stage, recompute) for stage in stages]
    kept, all_copies = kept_until(stages, samples, recompute), sum(copies)
    unkept = sum(narrow_copies(split, stage, False) for stage in stages) - all_copies
    logits = stages[-1].gradients["loss"] / 2 * samples  # log-probabilities, and logits in both widths
    all_experts = sum(split.held(p) * split.width for p in split.experts)
    earlier = (all_experts + alone * sum(sizes)) * accumulates
    yield buckets + earlier + kept[-1] + all_copies + unkept + 1.5 * logits
    came = experts_came = in_flight = 0.0  # bytes of gradients
    for i in reversed(range(len(stages))):
        own = parameters_of(split, stages[i], before=stages[:i])
        of_experts = sum(split.held(p) * split.width for p in own if p in split.experts)
        came += sum(split.held(p) * split.width for p in own if p not in split.experts) * alone
        here = sum(copies[: i + 1]) + one_gradient(split, own)
        for activations in at_start_and_in_the_middle(stages, i, kept, samples, recompute):
            yield buckets + here + max(earlier, came + of_experts) + in_flight + activations
        came, experts_came = came + of_experts, experts_came + of_experts
        full = experts_came if experts_came == all_experts else max(0, experts_came - BUCKET)
        in_flight = full * (split.dp_size > 1)
    yield buckets + came + in_flight


def moments_split(
    split: Split, stages: Sequence[Stage], samples: int, recompute: bool, accumulates: bool
) -> Iterator[float]:
    own = [parameters_of(split, stage, before=stages[:i]) for i, stage in enumerate(stages)]
    whole = [sum(map(split.gathered_bytes, each)) for each in own]
    given = [sum(map(split.summed_bytes, each)) for each in own]
    kept = kept_until(stages, samples, recompute)
    outside = sum(map(split.gathered_bytes, split.outside))
    of_head = sum(map(split.gathered_bytes, parameters_of(split, stages[-1], before=())))  # its gradient stays
    parts = [sum(split.held(p) * split.width for p in each) for each in own]  # of gradients, after the reduce-scatter
    came, outside = 0.0, outside + sum(parts) * accumulates
    yield outside + whole[-2] + kept[-1] + busy(stages[-1], samples, recompute)
    of_experts = sum(split.gathered_bytes(p) for p in own[-2] if p in split.experts) * (split.dp_size > 1)
    yield outside + kept[-2] + 2 * whole[-2] + of_experts  # in forward, as it arrives: parts on dim 1 are put in order
    for i in reversed(range(1, len(stages) - 1)):
        before, after = whole[i - 1] if i > 1 else 0, given[i + 1] if i < len(stages) - 2 else 0
        always = outside + of_head + came + before
        start, middle = at_start_and_in_the_middle(stages, i, kept, samples, recompute)
        yield always + start + 1.25 * whole[i] + after
        yield always + middle + 1.5 * whole[i] + after
        of_dense = sum(split.gathered_bytes(p) for p in own[i] if p not in split.experts)
        yield always + kept[i - 1] + of_dense + given[i]  # the gradients of experts have gone before
        came += parts[i] * (not accumulates)
    yield outside + came + kept[0] + given[0] + given[-1]


def kept_until(stages: Sequence[Stage], samples: int, recompute: bool) -> list[float]:
    """Return for each stage what it and all stages before it have kept."""
    total, totals = 0.0, []
    for stage in stages:
        total += samples * (stage.kept + (stage.inputs if recompute else sum(stage.inside.values())))
        total += 0.0 if recompute else sum(stage.once.values())
        totals.append(total)
    return totals


def at_start_and_in_the_middle(
    stages: Sequence[Stage], i: int, kept: Sequence[float], samples: int, recompute: bool
) -> tuple[float, float]:
    """Return bytes of activations and their gradients when backward enters a stage, and when it is in its busiest part:
    then half of what the stage has kept is gone. After the blocks that part is the first one, the loss."""
    last = i == len(stages) - 1
    middle = kept[i] if last or i == 0 else (kept[i] + kept[i - 1]) / 2
    least = min((size for size in stages[i].gradients.values() if size), default=0.0)
    of_stream = 2 * samples * stages[i].stream  # its gradient, and that of a part's result
    return kept[i] + of_stream + samples * least, middle + of_stream + busy(stages[i], samples, recompute)


def busy(stage: Stage, samples: int, recompute: bool) -> float:
    """Return what is there beside what is kept while backward is in the busiest part of a stage."""
    parts = stage.gradients.keys() | stage.inside.keys()
    sizes = (samples * (recompute * stage.inside[p] + stage.gradients[p]) + recompute * stage.once[p] for p in parts)
    return max(sizes, default=0.0)


def parameters_of(split: Split, stage: Stage, before: Sequence[Stage]) -> list[nn.Parameter]:
    """Return the parameters whose gradients are complete in this stage: those that no stage before it uses too."""
    used = {p for other in before for m in other.modules for p in m.parameters(recurse=False)}
    own = {p: None for m in stage.modules for p in m.parameters(recurse=False) if p not in used}
    return list(own)


def one_gradient(split: Split, parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of the largest gradient, as it is computed and as it is kept."""
    width, c = split.width, COMPUTE_BYTES[split.precision]
    return max((split.held(p) * (width + (c if c < width else 0)) for p in parameters), default=0)


def narrow_copies(split: Split, stage: Stage, recompute: bool) -> int:
    """Return bytes of the weights in bfloat16 that autocast's products keep for backward. recompute: parts that are
    computed again make their copies again. Weights that are split are gathered in bfloat16 instead."""
    if split.precision != "bf16-mixed" or split.dense != "replicated":
        return 0
    parts = {m for part in stage.inside if isinstance(part, nn.Module) for m in part.modules()} if recompute else set()
    linear = sum(p.numel() for m in stage.modules - parts if isinstance(m, nn.Linear) for p in m.parameters())
    if recompute:
        return 2 * linear
    experts = sum(
        copies // moe.router.top_k * sum(split.held(p) for p in moe.experts.parameters())
        for block in stage.modules
        for moe, copies in own_moe_uses(block)
    )
    return 2 * (linear + experts)
