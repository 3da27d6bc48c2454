"""These are the trainings that tests/distributed/test_ep_equality.py compares, by name, as words of the config."""

from tests.support.architectures import AFTER_NORM, BETWEEN_BLOCKS, EVERY_BLOCK, LATENT_ATTENTION, TABLES

ARCHITECTURES = TABLES | EVERY_BLOCK | BETWEEN_BLOCKS
LLAMA = "model.family=llama model.heads=4 model.kv_heads=2 trainer.max_steps=1"  # GPT takes three steps
ARCHITECTURES |= {f"llama, {name}": f"{text} {LLAMA}" for name, text in ARCHITECTURES.items()}
ARCHITECTURES |= {"nvidia": AFTER_NORM["nvidia"]}
ARCHITECTURES |= {
    name: f"{LATENT_ATTENTION[name]} model.family=llama model.heads=4 trainer.max_steps=1"
    for name in ("longcat", "instella")
}
CLIP = 0.25  # below every norm of this model
CLIPPED = f"trainer.accumulate=2 trainer.gradient_clip={CLIP}"
ROUTERS = {  # biases move visibly in three steps, by the load of both batches of each
    "deepseek": "architecture=shared_expert router=deepseek top_k=3 router_scale=2.5 bias_rate=0.1 "
    "trainer.accumulate=2",
    "longcat router": "router=longcat top_k=3 router_scale=6 zero_experts=4 bias_rate=1 tap_norm=shared "
    "combine=direct_add ffn_dim=32 leading_dense=[40] model.layers=3 trainer.accumulate=2",
    "retrofit": "position=pos2 router=deepseek top_k=3 bias_rate=0.1 zero_experts=4 zero_output=zero",
}
ONE = {
    **ARCHITECTURES,
    **ROUTERS,
    "clipped": f"position=pos2 {CLIPPED}",
    "clipped top-2": f"architecture=top_k top_k=2 {CLIPPED}",
    "starved": "position=pos2 starved",
}
BUFFERS = "moe.rows=buffers moe.dropless_ceiling"
EP1, EP2, EP4 = (f"strategy.ep_size={ep_size}" for ep_size in (1, 2, 4))
SLOTS = {  # (position, slot, chunks): its words
    (position, slot, chunks): f"position={position} schedule.slot={slot} schedule.chunks={chunks}"
    for chunks in (1, 2)
    for position, slots in (("pos1", 3), ("pos2", 4), ("pos3", 5))
    for slot in range(slots)
}
INSIDE = "schedule.inside_attention=true"
PARTED = (("pos1", 1), ("pos2", 2), ("pos3", 1))  # positions and chunks of those that run experts inside attention
SEQUENTIAL = {(p, c): f"position={p} schedule.chunks={c} sequential" for p in ("pos1", "pos2", "pos3") for c in (1, 2)}
CHUNKED = {  # these are in float32; in float64, TWO compares all slots and chunks with one process
    (position, chunks): f"position={position} schedule.chunks={chunks} trainer.precision=32-true {EP2}"
    for position in ("pos1", "pos2", "pos3")
    for chunks in (1, 2, 4)
}
# case: (what one process calls it, its words)
TWO = {
    **{f"{name}, EP 2": (name, f"{text} {EP2}") for name, text in ONE.items()},
    **{f"{name}, DP 2": (name, f"{ONE[name]} {EP1}") for name in ("pos2", "top-2", "clipped", "starved")},
    **{f"{p}, slot {s}, chunks {c}": (p, f"{EP2} {text}") for (p, s, c), text in SLOTS.items()},
    **{f"{p}, sequential, chunks {c}": (p, f"{EP2} {text}") for (p, c), text in SEQUENTIAL.items()},
    # There are as many slots as tokens, so nothing is dropped.
    "roomy": ("pos2", f"position=pos2 {EP2} capacity_factor=8"),
    "roomy, chunks 2": ("pos2", f"position=pos2 {EP2} capacity_factor=8 schedule.chunks=2"),
    "roomy top-2": ("top-2", f"architecture=top_k top_k=2 {EP2} capacity_factor=4"),
    "roomy, slots": ("pos2", f"position=pos2 {EP2} capacity_factor=8 moe.rows=slots"),
    "roomy, slots, chunks 2": ("pos2", f"position=pos2 {EP2} capacity_factor=8 moe.rows=slots schedule.chunks=2"),
    # A buffer of twice the fair share of two ranks has room for every row.
    **{f"buffers, chunks {c}": ("pos2", f"position=pos2 {EP2} {BUFFERS}=2 schedule.chunks={c}") for c in (1, 3)},
    "buffers, top-2": ("top-2", f"architecture=top_k top_k=2 {EP2} {BUFFERS}=2 moe.overflow=refuse"),
    "buffers, starved": ("starved", f"position=pos2 starved {EP2} {BUFFERS}=2"),
    **{
        f"{p}, inside attention, chunks {c}": (p, f"position={p} {INSIDE} schedule.chunks={c} {EP2}") for p, c in PARTED
    },
    **{f"farskip, slot {s}": ("farskip", f"{ONE['farskip']} {EP2} schedule.slot={s}") for s in (0, 2)},
    "farskip, inside attention": ("farskip", f"{ONE['farskip']} {EP2} {INSIDE}"),
    "buffers, dgmoe": ("dgmoe", f"{ONE['dgmoe']} {EP2} {BUFFERS}=2"),
}
SLOTS_ON_FOUR = {key: words for key, words in SLOTS.items() if key[0] == "pos3" and key[2] == 2}  # the longest window
FOUR = {
    **{f"{name}, EP 4": (name, f"{ONE[name]} {EP4}") for name in ("pos2", "top-2", "clipped", "starved", *ROUTERS)},
    **{
        f"{name}, DP 2 x EP 2": (name, f"{ONE[name]} {EP2}")
        for name in ("pos2", "top-2", "clipped", "clipped top-2", "longcat router")
    },
    **{f"{name}, EP 4": (name, f"{ONE[name]} {EP4}") for name in BETWEEN_BLOCKS},
    "buffers, EP 4": ("pos2", f"position=pos2 {EP4} {BUFFERS}=4"),
    "pos2, DP 4": ("pos2", f"position=pos2 {EP1}"),
    **{f"{p}, slot {s}, chunks {c}": (p, f"{EP4} {text}") for (p, s, c), text in SLOTS_ON_FOUR.items()},
    "pos3, sequential, chunks 2": ("pos3", f"{EP4} {SEQUENTIAL['pos3', 2]}"),
}
OTHERS = {  # trainings of two ranks
    **{f"{p}, fp32, chunks {c}": text for (p, c), text in CHUNKED.items()},
    "wire": f"position=pos2 {EP2} trainer.precision=32-true strategy.wire_dtype=bfloat16",
    "wire, sequential": f"position=pos2 {EP2} trainer.precision=32-true strategy.wire_dtype=bfloat16 sequential",
    "tight, EP 2": f"position=pos2 {EP2} capacity_factor=1 schedule.chunks=2",
    "tight, DP 2": f"position=pos2 {EP1} capacity_factor=1 schedule.chunks=2",
    "bf16": f"position=pos2 {EP2} trainer.precision=bf16-mixed trainer.max_steps=2",
    "fp32": f"position=pos2 {EP2} trainer.precision=32-true",
    "starved fp32": f"position=pos2 starved {EP2} trainer.precision=32-true",
    "starved bf16": f"position=pos2 starved {EP2} trainer.precision=bf16-mixed",
    "dropout": f"position=pos2 {EP2} model.dropout=0.1",
}
