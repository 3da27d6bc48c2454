"""A row of `bench overlap`, predicted by the played step (scmoe/predict/simulated_step.py) from
what top-2 measured alone.

A row that routes each token to k experts has k / 2 of top-2's rows: transfers, experts, encode and
decode take that part of top-2's time. A shared expert takes the time of an MLP. The slot and the
number of chunks are those with the least step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from experiments.bench.emulated import OUT_PART
from experiments.bench.pairs import ROWS, default_schedule
from experiments.bench.row import Kind
from experiments.simulate.reports import LAUNCH_S, ROUTED, Calibration
from scmoe.loads import Sizes, load_of
from scmoe.predict.batches import InFlight
from scmoe.predict.compared_models import rank_shares
from scmoe.predict.row_names import batches_of
from scmoe.predict.shared_link import Sum
from scmoe.predict.simulated_step import (
    Block,
    StepSetting,
    StepTime,
    simulate_forward,
    simulate_step,
)
from scmoe.schedule.cost import OperatorTimes, slots
from scmoe.schedule.play import BEFORE, LAUNCH, Load
from scmoe.schedule.schedule import SUBLAYERS, Schedule

EVERY = 2  # pairs of blocks
BY_ROWS = ("encode", "dispatch", "experts", "combine", "decode")


@dataclass(frozen=True)
class Predicted:
    """A row at its best schedule, in seconds. free: the same with free links."""

    schedule: Schedule
    forward: float
    train: float
    free_forward: float
    free_train: float

    def seconds(self, kind: Kind) -> float:
        return self.forward if kind == "forward" else self.train

    def free_seconds(self, kind: Kind) -> float:
        return self.free_forward if kind == "forward" else self.free_train


def predict_row(calibration: Calibration, row: str, inside: bool, load: str | None) -> Predicted:
    """Return a row at the schedule with the least step. inside: whether experts may run inside an
    attention. load: of the experts; None: balanced."""
    block, chunk_counts = ROWS[EVERY][row]
    schedules = [
        schedule
        for chunks in chunk_counts
        for schedule in slots(replace(default_schedule(block), chunks=chunks))
        if inside or not schedule.inside_attention
    ]
    setting = step_setting(calibration, block, batches_of(row))
    played = [predict(calibration, block, schedule, setting, load) for schedule in schedules]
    return min(played, key=lambda predicted: predicted.train)


def predict_sequential(calibration: Calibration, load: str | None) -> Predicted:
    """Return sequential top-2, which all rows are compared with."""
    setting = replace(step_setting(calibration, "top2", 1), sequential=True)
    return predict(calibration, "top2", default_schedule("top2"), setting, load)


def step_setting(calibration: Calibration, block: str, batches: int) -> StepSetting:
    """Return how a step of a row runs. The update of a row takes as much longer than top-2's as it
    has more weights."""
    weights = num_weights(calibration, block) / num_weights(calibration, "top2")
    return StepSetting(
        batches=InFlight.HALVES if batches == 2 else InFlight.ONE,
        accumulate=calibration.setting.accumulate,
        sums_at_once=2,  # of gloo
        burst=calibration.burst,
        tax=calibration.tax,
        update_s=calibration.update * weights,
    )


def num_weights(calibration: Calibration, block: str) -> int:
    """Return the weights of a rank. Emulated experts have none."""
    sizes = calibration.setting
    attention = 4 * sizes.dim**2
    mlp = 2 * sizes.dim * sizes.ffn_dim
    dense_mlps = sizes.layers - sizes.moe_blocks
    if "shared_expert" in default_schedule(block).window:
        dense_mlps += sizes.moe_blocks
    experts = sizes.moe_blocks * sizes.num_experts // sizes.ranks
    if sizes.compute == "emulated":
        experts = 0
    return sizes.layers * attention + (dense_mlps + experts) * mlp


def predict(
    calibration: Calibration, block: str, schedule: Schedule, setting: StepSetting, load: str | None
) -> Predicted:
    """Return the times of a row of blocks under a schedule."""
    pairs = calibration.setting.moe_blocks
    copies = calibration.setting.top_k_of(block)
    blocks = [pair_of(calibration, schedule, copies)] * pairs
    loads = None
    if load is not None:
        loads = [load_of_ranks(calibration, load, copies, schedule.chunks)] * pairs
    longer_forward, longer_step = calibration.longer_in_halves
    step = simulate_step(blocks, replace(setting, longer=longer_step), loads=loads)
    forward = simulate_forward(blocks, replace(setting, longer=longer_forward), loads=loads)
    return Predicted(schedule, forward.total, step.total, computing_of(forward), computing_of(step))


def computing_of(time: StepTime) -> float:
    return time.computing + time.update


def pair_of(calibration: Calibration, schedule: Schedule, copies: int) -> Block:
    """Return a pair of blocks. copies: routed experts of a token."""
    both = OperatorTimes(
        pair_times(calibration, schedule, copies, backward=False),
        pair_times(calibration, schedule, copies, backward=True),
    )
    sums = () if calibration.setting.level == "block" else tuple(sums_of(calibration, schedule))
    once = {LAUNCH: LAUNCH_S}
    return Block(schedule, both, sums, fixed=OperatorTimes(once, once))


def before_tap(schedule: Schedule) -> tuple[str, ...]:
    """Return the sub-layers of a pair before the tap."""
    return SUBLAYERS[: len(SUBLAYERS) - schedule.sublayers_after_tap]


def pair_times(
    calibration: Calibration, schedule: Schedule, copies: int, backward: bool
) -> dict[str, float]:
    """Return the seconds of a pair's operators in one direction, with BEFORE."""
    module, sublayers = calibration.operators.forward, calibration.sublayers.forward
    if backward:
        module, sublayers = calibration.operators.backward, calibration.sublayers.backward
    part = copies / ROUTED
    times = {name: t * part if name in BY_ROWS else t for name, t in module.items()}
    times |= sublayers
    times["shared_expert"] = sublayers["mlp"]
    times["attention_core"] = (1 - OUT_PART) * sublayers["attention"]
    times["attention_out"] = OUT_PART * sublayers["attention"]
    times[LAUNCH] = LAUNCH_S
    times[BEFORE] = sum(sublayers[name] for name in before_tap(schedule))
    return times


def sums_of(calibration: Calibration, schedule: Schedule) -> Iterator[Sum]:
    """Yield the sums of a pair's dense gradients. The gate and the norms are left out."""
    sizes = calibration.setting
    attention = calibration.sum_s(4 * sizes.dim**2)
    mlp = calibration.sum_s(2 * sizes.dim * sizes.ffn_dim)
    seconds = {
        "attention": attention,
        "attention_core": 3 / 4 * attention,
        "attention_out": attention / 4,
        "mlp": mlp,
        "shared_expert": mlp,
    }
    before, after = schedule.around_experts
    for name in dict.fromkeys((*before, *after)):
        yield Sum(seconds[name], name)

    backward = calibration.sublayers.backward
    sublayers = before_tap(schedule)
    whole = sum(backward[name] for name in sublayers)
    passed = 0.0
    for name in reversed(sublayers):
        passed += backward[name]
        yield Sum(seconds[name], BEFORE, passed / whole)


def load_of_ranks(calibration: Calibration, load: str, copies: int, chunks: int) -> Load:
    """Return the rows of each chunk and rank, over even ones, at the first step of a load."""
    sizes = calibration.setting
    in_chunks = rank_shares(load_of(load), Sizes(sizes.num_experts, copies, sizes.ranks))
    assert in_chunks is not None  # the testbed has two ranks or more
    return in_chunks(chunks, None)[0]
