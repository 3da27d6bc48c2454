"""These are the trainings of tests/distributed/test_sharded.py, by name, as words of the config.

Dense weights are split over all ranks, or (hybrid) over the ranks of a node of two, with a copy on each node.
"""

from __future__ import annotations

from tests.support.cases import ARCHITECTURES, CLIP, SLOTS

SHARDED = "strategy.dense=sharded"
HYBRID = "strategy.dense=hybrid trainer.devices={} trainer.num_nodes=2"
CLIPPED = f"trainer.accumulate=2 trainer.gradient_clip={CLIP}"
ONE = {  # trainings of one process
    "clipped": f"position=pos2 top_k=2 {CLIPPED}",
    "norm": f"position=pos3 tap_norm=shared {CLIPPED}",
    **{name: ARCHITECTURES[name] for name in ("dgmoe-share", "pos2-every-block", "instella")},
}


def words(how: str, ep_size: int, ranks: int) -> str:
    return f"strategy.ep_size={ep_size} " + {"sharded": SHARDED, "hybrid": HYBRID.format(ranks // 2)}[how]


# case: (what one process calls it, its words). Each way and EP degree occurs; the whole suite below has
# the other pairs.
FOUR = {
    "clipped, EP 2": ("clipped", f"{ONE['clipped']} {words('sharded', 2, 4)}"),
    "norm, recompute, hybrid, EP 1": ("norm", f"{ONE['norm']} trainer.recompute=true {words('hybrid', 1, 4)}"),
    "dgmoe-share, EP 4": ("dgmoe-share", f"{ONE['dgmoe-share']} {words('sharded', 4, 4)}"),
    "pos2-every-block, EP 1": ("pos2-every-block", f"{ONE['pos2-every-block']} {words('sharded', 1, 4)}"),
    "instella, EP 2": ("instella", f"{ONE['instella']} schedule.inside_attention=true {words('hybrid', 2, 4)}"),
}

# The whole suite: every architecture both ways, with EP 1, 2 and 4 in turn on four ranks, and 2 and 4 on eight.
EVERY_ON_FOUR = {
    f"{name}, {how}": (name, f"{text} {words(how, (1, 2, 4)[(i + j) % 3], 4)}")
    for j, how in enumerate(("sharded", "hybrid"))
    for i, (name, text) in enumerate(ARCHITECTURES.items())
}
EVERY_ON_EIGHT = {
    name: (name, f"{text} {words(('sharded', 'hybrid')[i // 2 % 2], (2, 4)[i % 2], 8)}")
    for i, (name, text) in enumerate(ARCHITECTURES.items())
}
SLOTS_ON_FOUR = {name: (schedule, f"{text} {words('sharded', 2, 4)}") for name, (schedule, text) in SLOTS.items()}
