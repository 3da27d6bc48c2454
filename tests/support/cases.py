"""These are trainings that are compared on one rank and on several, by name, as words of the
config."""

from scmoe.schedule.schedule import POSITIONS, Schedule
from tests.support.architectures import (
    AFTER_NORM,
    BETWEEN_BLOCKS,
    EVERY_BLOCK,
    EVERY_FOURTH_BLOCK,
    LATENT_ATTENTION,
    TABLES,
)

ARCHITECTURES = TABLES | EVERY_BLOCK | EVERY_FOURTH_BLOCK | BETWEEN_BLOCKS
LLAMA = "model.family=llama model.heads=4 model.kv_heads=2 trainer.max_steps=1"
ARCHITECTURES |= {f"llama, {name}": f"{text} {LLAMA}" for name, text in ARCHITECTURES.items()}
ARCHITECTURES |= {"nvidia": AFTER_NORM["nvidia"]}
ARCHITECTURES |= {
    name: f"{LATENT_ATTENTION[name]} model.family=llama model.heads=4 trainer.max_steps=1"
    for name in ("longcat", "instella")
}
# Those of `make test` send rows differently. The fault suite has the others, which differ in what
# each rank computes.
QUICK = (
    *("top-2", "pos1", "pos2", "pos3", "dgmoe", "dgmoe-share"),
    *("top-2-every-block", "pos2-every-block", "farskip"),
    *("llama, dgmoe-share", "nvidia", "longcat", "instella"),
)
# SGD keeps nothing between steps: one is enough for the others
THREE_STEPS = ("pos2", "top-2", "dgmoe-share")
CLIP = 0.25  # below every norm of this model
CLIPPED = f"trainer.accumulate=2 trainer.gradient_clip={CLIP}"
ROUTERS = {  # biases move visibly in three steps, by the load of both batches of each
    "deepseek": (
        "architecture=shared_expert router=deepseek top_k=3 router_scale=2.5 bias_rate=0.1 "
        "trainer.accumulate=2"
    ),
    "longcat router": (
        "router=longcat top_k=3 router_scale=6 zero_experts=4 bias_rate=1 tap_norm=shared "
        "combine=direct_add ffn_dim=32 leading_dense=[40] model.layers=3 trainer.accumulate=2"
    ),
    "deepseek, zero experts": (
        "position=pos2 router=deepseek top_k=3 bias_rate=0.1 zero_experts=4"
    ),
}
ONE = {
    **{name: f"{ARCHITECTURES[name]} trainer.max_steps=1" for name in QUICK},
    **{name: ARCHITECTURES[name] for name in THREE_STEPS},
    **ROUTERS,
    "clipped": f"position=pos2 {CLIPPED}",
    "clipped top-2": f"architecture=top_k top_k=2 {CLIPPED}",
    "starved": "position=pos2 starved",
}
BUFFERS = "moe.rows=buffers moe.dropless_ceiling"
EP1, EP2, EP4 = (f"strategy.ep_size={ep_size}" for ep_size in (1, 2, 4))
# case: (what one process calls it, its words)
TWO = {
    **{f"{name}, EP 2": (name, f"{text} {EP2}") for name, text in ONE.items()},
    **{f"{name}, DP 2": (name, f"{ONE[name]} {EP1}") for name in ("clipped", "starved")},
    # There are as many slots as tokens, so nothing is dropped. test_capacity.py compares the rows
    # themselves.
    "roomy top-2": ("top-2", f"architecture=top_k top_k=2 {EP2} capacity_factor=4"),
    "roomy, slots": (
        "pos2",
        f"position=pos2 {EP2} capacity_factor=8 moe.rows=slots schedule.chunks=2",
    ),
    # A buffer of twice the fair share of two ranks has room for every row.
    "buffers, top-2": (
        "top-2",
        f"architecture=top_k top_k=2 {EP2} {BUFFERS}=2 moe.overflow=refuse",
    ),
    "buffers, starved": ("starved", f"position=pos2 starved {EP2} {BUFFERS}=2"),
    "buffers, dgmoe": ("dgmoe", f"{ONE['dgmoe']} {EP2} {BUFFERS}=2"),
}
FOUR = {
    **{
        f"{name}, EP 4": (name, f"{ONE[name]} {EP4}")
        for name in ("clipped", "starved", "farskip", *ROUTERS)
    },
    **{
        f"{name}, DP 2 x EP 2": (name, f"{ONE[name]} {EP2}")
        for name in ("clipped top-2", "longcat router")
    },
    "buffers, EP 4": ("pos2", f"position=pos2 {EP4} {BUFFERS}=4"),
}
OTHERS = {  # trainings of two ranks
    "tight, EP 2": f"position=pos2 {EP2} capacity_factor=1 schedule.chunks=2",
    "tight, DP 2": f"position=pos2 {EP1} capacity_factor=1 schedule.chunks=2",
    "bf16": f"position=pos2 {EP2} trainer.precision=bf16-mixed trainer.max_steps=2",
    "fp32": f"position=pos2 {EP2} trainer.precision=32-true",
    "starved bf16": f"position=pos2 starved {EP2} trainer.precision=bf16-mixed",
    "dropout": f"position=pos2 {EP2} model.dropout=0.1",
}
SCHEDULES = {position: Schedule("scmoe", position) for position in POSITIONS} | {
    "farskip": Schedule("farskip")
}
# case: (its schedule, words) of a training at every slot
SLOTS = {name: (schedule, ARCHITECTURES[name]) for name, schedule in SCHEDULES.items()}


def split(how: str, ep_size: int, ranks: int) -> str:
    """Return words: dense weights are split over all ranks (sharded), or (hybrid) over the ranks
    of each of two nodes, with a copy on each node."""
    nodes = f" trainer.devices={ranks // 2} trainer.num_nodes=2" if how == "hybrid" else ""
    return f"strategy.dense={how} strategy.ep_size={ep_size}{nodes}"
