"""Operators are counted as a model has them, and timed as a rank runs them."""

import math
from dataclasses import replace

import pytest

from scmoe.loads import Sizes, load_of
from scmoe.models.model_cost import forward_flops
from scmoe.predict.advised_rows import Choice, Simulator
from scmoe.predict.asked_config import read_asked
from scmoe.predict.batches import InFlight
from scmoe.predict.cluster import read_profile
from scmoe.predict.compared_models import architectures, rank_shares
from scmoe.predict.judged_job import Request
from scmoe.predict.operator_costs import OUTSIDE, Kernel
from scmoe.predict.timed_blocks import JobSizes, blocks_on, fused, reschedule, update_seconds
from scmoe.schedule.play import BEFORE
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model_on_meta
from tests.support.advised import QUICK, counted_on, quickstart_on_cards


@pytest.fixture(scope="module")
def counted():
    return quickstart_on_cards()


@pytest.fixture(scope="module")
def swin():
    """SwinV2, whose stage 4 routes two copies, whatever stage 3 does."""
    pytest.importorskip("timm")
    profile = read_profile("8xH100")
    words = ["moe.capacity_factor=null", "model.layers=2"]  # of stage 3
    request = Request(read_asked("swinv2_moe_s_tiny", words), samples=512)
    return profile, *counted_on(profile, request, "top2", "shared_expert", "scmoe_pos2")


def test_products_are_those_of_a_gpts_closed_form(counted):
    """2 of each weight and row, and 2 S D of a token's causal attention; a capacity of 2 pads."""
    _, job, models = counted
    config = job.config
    dim, tokens = config.model.dim, 4 * config.data.seq_len
    weights = 4 * dim**2 + 8 * dim**2  # of a dense block
    attention = 2 * config.data.seq_len * dim
    gate = dim * config.moe.num_experts
    for name, rows in (("top2", 2 * 2.0), ("top1", 2.0), ("shared_expert", 2.0 + 1)):
        pair = 2 * weights - 8 * dim**2 + gate + rows * 8 * dim**2
        small = 2 * dim * 2 if name == "shared_expert" else 0  # CG-1's gate, at most
        flops = tokens * (2 * (2 * pair + 2 * attention) + 2 * dim * config.data.vocab_size)
        assert models[name].costs.flops == pytest.approx(flops, abs=tokens * 2 * small)


@pytest.mark.parametrize(
    "words",
    [[], pytest.param(["moe.leading_dense=[256]", "moe.every=1"], marks=pytest.mark.faults)],
    ids=str,
)
def test_products_of_a_llama_are_those_of_the_estimate(words):
    sizes = ["model.family=llama", "model.layers=4", "model.kv_heads=2", "moe.num_experts=16"]
    request = Request(read_asked("quickstart", [*sizes, *words, "moe.capacity_factor=null"]))
    assert_products_are_the_estimate_s(request, rel=1e-6)


def test_products_of_a_swin_are_those_of_the_estimate(swin):
    """Beside its position bias, which is computed once a batch."""
    _, job, models = swin
    assert_equal_the_estimate_s(job, models, rel=1e-3)


def assert_products_are_the_estimate_s(request, rel):
    assert_equal_the_estimate_s(*counted_on(read_profile("8xH100"), request), rel)


def assert_equal_the_estimate_s(job, models, rel):
    """A causal attention is counted in full there, and half of it here."""
    config = job.config
    seq_len = config.data.seq_len
    skipped = 0.0
    if config.model.family != "swin":
        width = config.model.head_dim or config.model.dim // config.model.heads
        skipped = config.model.layers * 2 * seq_len**2 * config.model.heads * width
    by_name = dict(architectures(config.moe, config.model.ffn_dim or 4 * config.model.dim))
    for name in models:
        model = build_model_on_meta(replace(config, moe=by_name[name]))
        of_a_sample = sum(forward_flops(model, seq_len).values()) - skipped
        assert models[name].costs.flops == pytest.approx(job.samples * of_a_sample, rel=rel), name


def test_parameters_and_gradients_are_counted_once(counted):
    for model in counted[2].values():
        costs = model.costs
        parts = [p for layer in costs.layers for p in (*layer.before, *layer.after)]
        layers = {layer: costs.layers.count(layer) for layer in costs.layers}
        assert len(layers) == 2 and len(costs.layers) == 2  # the first has the embedding
        assert sum(p.dense for p in (*parts, *costs.head)) == costs.dense_parameters
        assert sum(p.expert for p in parts) == costs.expert_parameters


def test_a_rank_of_many_reads_fewer_experts_and_all_its_rows(counted):
    profile, _, models = counted
    machine = profile.machine()
    costs = models["scmoe_pos2"].costs
    alone, eight = (blocks_on(machine, costs, JobSizes(8, ep))[0][0] for ep in (1, 8))
    assert alone.times.forward["dispatch"] == 0 < eight.times.forward["dispatch"]
    assert eight.least.forward["experts"] == pytest.approx(alone.least.forward["experts"] / 8)
    assert eight.times.forward["attention"] == alone.times.forward["attention"]
    moved = reschedule([alone, alone], Schedule("scmoe", "pos2", 3, 4))
    assert moved[0] is moved[1] and moved[0].schedule.slot == 3


def experts_times(costs, machine, **changes):
    """Return the operators of a block whose experts' kernels are changed."""

    def changed(part):
        if part.operator != "experts":
            return part
        return part._replace(kernels=tuple(k._replace(**changes) for k in part.kernels))

    layers = [layer._replace(after=tuple(map(changed, layer.after))) for layer in costs.layers]
    return blocks_on(machine, replace(costs, layers=layers), JobSizes(8, 8))[0][0].times.forward


@pytest.mark.parametrize(("precision", "nbytes"), [("bf16-mixed", 28), ("bf16-true", 14)])
def test_an_update_reads_four_numbers_of_a_parameter_and_writes_three(counted, precision, nbytes):
    profile, _, models = counted
    costs = models["scmoe_pos2"].costs
    costs = replace(costs, job=replace(costs.job, precision=precision))
    machine = replace(profile.machine(), memory=1e9)
    held = costs.dense_parameters + costs.expert_parameters / 4
    assert update_seconds(machine, costs, JobSizes(8, 4)) == pytest.approx(nbytes * held / 1e9)


def test_padding_is_sent_computed_and_kept():
    profile = read_profile("8xH100")
    # a preset, so that the batch of a step is free
    preset = "gpt2_moe_small_tiny"

    def top_2(padding, capacity="null"):
        words = [f"moe.capacity_factor={capacity}", "model.layers=2"]
        request = Request(read_asked(preset, words), samples=8)
        return counted_on(replace(profile, padding=padding), request, "top2")[1]["top2"]

    def rows(model, operator):
        (part,) = (p for p in model.costs.layers[0].after if p.operator == operator)
        return part

    usual, padded = top_2(None), top_2(1.5)
    for model, factor in ((usual, 1.0), (padded, 1.5)):
        sent = rows(model, "dispatch").rows_bytes
        assert sent == pytest.approx(factor * rows(usual, "dispatch").rows_bytes)
        assert rows(model, "experts").flops == pytest.approx(factor * rows(usual, "experts").flops)
    assert padded.memory(8, 1, InFlight.ONE) > usual.memory(8, 1, InFlight.ONE)
    in_slots = top_2(None, capacity=1.5)
    assert padded.memory(8, 1, InFlight.ONE) == pytest.approx(in_slots.memory(8, 1, InFlight.ONE))


def test_the_layout_takes_no_time_for_weights_and_launches_of_experts(counted):
    """Gate, encode and decode are charged shares of the time of an expert's rows."""
    profile, _, models = counted
    machine = replace(profile.machine(), moe=0.3, copy=0.15)
    costs = models["top2"].costs
    usual = experts_times(costs, machine)
    heavy = experts_times(costs, machine, weights=1e10)
    assert heavy["experts"] > 10 * usual["experts"]
    bare = experts_times(costs, replace(machine, moe=0.0, copy=0.0))
    for operator in ("route", "encode", "decode"):
        assert heavy[operator] == usual[operator] > bare[operator]


def test_a_rank_launches_the_experts_that_it_holds(counted):
    """Where a loop runs three kernels for each of them, as on a CPU; their bytes are rows in and
    out, and both sides of the activation."""
    profile, job, models = counted
    config = job.config
    host = replace(profile, precision="32-true")
    looped = counted_on(host, QUICK, "top2")[1]["top2"].costs
    only_launches = replace(profile.machine(), launch=1.0)
    experts = config.moe.num_experts

    def launches(costs, ep):
        return blocks_on(only_launches, costs, JobSizes(8, ep))[0][0].fixed.forward["experts"]

    assert [launches(looped, ep) for ep in (1, 2, 8)] == [3 * experts / ep for ep in (1, 2, 8)]
    assert launches(models["top2"].costs, 1) == launches(models["top2"].costs, 8)
    (part,) = (p for p in looped.layers[0].after if p.operator == "experts")
    rows = 2 * looped.tokens  # the capacity is not padded on a CPU
    wide = config.model.ffn_dim or 4 * config.model.dim
    moved = sum(kernel.moved for kernel in part.kernels)
    assert moved == 4 * rows * (2 * config.model.dim + 4 * wide)


def test_sublayers_of_dense_blocks_are_operators_too():
    """Attention there takes the machine's factor, and both are computed again where they are
    checkpointed."""
    words = ["model.layers=5", "moe.leading_dense=[256]", "moe.every=2"]
    profile = read_profile("8xH100")
    request = Request(read_asked("quickstart", words))
    costs = counted_on(profile, request, "top2")[1]["top2"].costs
    before = costs.layers[0].before
    operators = [part.operator for part in before if part.operator != OUTSIDE]
    assert operators == ["attention", "mlp", "attention", "mlp", "attention"]
    machine = replace(profile.machine(), attention=1.0, launch=0.0)

    def seconds(*operators):
        """Return those of the kernels of these operators."""
        return sum(
            max(k.flops / machine.flops, (k.moved + k.weights) / machine.memory)
            for part in before
            if part.operator in operators
            for k in part.kernels
        )

    def times(machine, costs):
        return blocks_on(machine, costs, JobSizes(8, 8))[0][0].times

    usual, longer = (times(replace(machine, attention=f), costs) for f in (1.0, 3.0))
    more_s = longer.forward[BEFORE] - usual.forward[BEFORE]
    assert more_s == pytest.approx(2 * seconds("attention"))
    again = times(machine, replace(costs, job=replace(costs.job, recompute=True)))
    more_s = again.backward[BEFORE] - usual.backward[BEFORE]
    assert more_s == pytest.approx(seconds("attention", "mlp"))


def test_what_is_recomputed_is_launched_and_read_once_more(counted):
    profile, _, models = counted
    costs = models["scmoe_pos2"].costs
    again = replace(costs, job=replace(costs.job, recompute=True))
    usual, longer = (
        blocks_on(profile.machine(), each, JobSizes(8, 8))[0][0] for each in (costs, again)
    )
    for times, more in ((usual.fixed, longer.fixed), (usual.least, longer.least)):
        assert more.forward == times.forward
        assert more.backward["experts"] == pytest.approx(1.5 * times.backward["experts"])


def test_dropless_rows_are_as_many_as_are_routed():
    """Whatever the number of experts; the slots of a capacity are rounded up, as they travel."""
    profile = read_profile("8xH100")
    sizes = ["moe.num_experts=128", "moe.top_k=7", "data.seq_len=50", "model.layers=2"]

    def models(capacity, samples, names=("top8", "top1", "scmoe_pos2")):
        words_of_job = [*sizes, f"moe.capacity_factor={capacity}"]
        # a preset, so that the batch of a step is free
        request = Request(read_asked("gpt2_moe_small_tiny", words_of_job), samples=samples)
        job, counted = counted_on(profile, request, *names)
        return job.config, {name: model.costs for name, model in counted.items()}

    config, few = models("null", samples=2)
    _, many = models("null", samples=128)
    row_bytes = 2 * config.model.dim
    for name, copies in (("top8", 8), ("top1", 1), ("scmoe_pos2", 7)):
        (dispatched,) = (p for p in few[name].layers[0].after if p.operator == "dispatch")
        assert dispatched.rows_bytes == 100 * copies * row_bytes
        assert few[name].tokens == 100
        assert few[name].flops == pytest.approx(many[name].flops / 64)
        assert few[name].logits_bytes == many[name].logits_bytes / 64
    _, padded = models("1.0", samples=2, names=("top8",))
    (dispatched,) = (p for p in padded["top8"].layers[0].after if p.operator == "dispatch")
    assert dispatched.rows_bytes == 128 * math.ceil(100 * 8 / 128) * row_bytes


@pytest.mark.parametrize(
    ("activation", "every"),
    [
        *(("gelu", 1), ("swiglu", 2)),
        *(pytest.param(*both, marks=pytest.mark.faults) for both in (("gelu", 2), ("swiglu", 1))),
    ],
)
def test_a_standard_model_gives_the_others_a_shared_expert_of_one_copy(activation, every):
    """Its narrow experts say how wide that is, whatever the width of its dense MLPs."""
    profile = read_profile("8xH100")
    words = [f"moe.every={every}", f"model.activation={activation}", "moe.capacity_factor=null"]
    words += ["model.ffn_dim=1536", "moe.ffn_dim=96", "moe.top_k=4", "moe.architecture=top_k"]
    request = Request(read_asked("gpt2_moe_small_tiny", words), samples=4)
    job, counted = counted_on(profile, request, "top4", "shared_expert", "scmoe_pos1")
    config = job.config
    models = {name: model.costs for name, model in counted.items()}
    blocks = config.model.layers // every
    matrices = 3 if activation == "swiglu" else 2
    expert = matrices * 96 * config.model.dim
    for name in ("shared_expert", "scmoe_pos1"):
        more = models[name].dense_parameters - models["top4"].dense_parameters
        assert more == pytest.approx(blocks * expert, rel=0.05)  # and biases, norms
        assert models[name].flops == pytest.approx(models["top4"].flops, rel=1e-3)


def test_a_block_is_charged_for_the_copies_that_it_routes(swin):
    profile, job, models = swin
    machine = replace(profile.machine(), moe=0.3, copy=0.15)
    last = {}
    for name in ("top2", "shared_expert", "scmoe_pos2"):
        blocks, _ = blocks_on(machine, models[name].costs, job.at(8))
        last[name] = blocks[-1].times.forward
    assert last["shared_expert"] == last["scmoe_pos2"] == last["top2"]


def test_a_load_is_dealt_with_the_copies_of_each_block(swin):
    profile, job, models = swin
    load = rank_shares(load_of("zipf:1.0"), Sizes(job.config.moe.num_experts, 1, 8))
    asked = []

    def loads(chunks, top_k):
        asked.append(top_k)
        return load(chunks, top_k)

    model = replace(models["shared_expert"], loads=lambda ep_size: loads)
    Simulator(profile.machine(), job).step(model, Choice(8, model.schedule))
    *others, last = asked
    assert set(others) == {1} and last == 2
    assert load(1, 1) == load(1) != load(1, 2)


def test_an_attention_with_unequal_widths_of_heads_costs_its_products():
    """Latent attention: its scores are in no memory, and no narrower value costs more."""
    latent = ["model.family=llama", "model.attention=latent", "model.latent.q_rank=16"]
    latent += ["model.latent.kv_rank=16", "model.latent.nope_dim=16", "model.latent.rope_dim=16"]
    profile = read_profile("8xH100")
    seconds = {}
    for value_dim in (16, 32):
        words = [*latent, f"model.latent.value_dim={value_dim}", "model.layers=2"]
        _, models = counted_on(profile, Request(read_asked("quickstart", words)), "top2")
        blocks, _ = blocks_on(profile.machine(), models["top2"].costs, JobSizes(8, 8))
        parts = models["top2"].costs.layers[0].before
        assert max(k.moved for part in parts for k in part.kernels) < 1e8
        seconds[value_dim] = blocks[0].times.forward[BEFORE]
    assert seconds[16] < seconds[32]


def test_fused_kernels_between_products_are_one():
    product = Kernel(8.0, 1.0, 1.0)
    small = Kernel(0.0, 3.0, 0.5)
    cast = Kernel(0.0, 0.0, 4.0)
    large = Kernel(0.0, 5.0, 0.0)
    merged = fused([cast, product, small, large, small, product])
    assert merged == [product, Kernel(0.0, 5.0, 1.0), product]


def test_ranks_that_share_weights_compute_parts_and_gather_tokens(counted):
    profile, _, models = counted
    costs = models["top2"].costs
    machine = replace(profile.machine(), launch=0.0)
    alone, four = (
        blocks_on(machine, costs, JobSizes(8, 8, tensor_parallel=n))[0][0].times.forward
        for n in (1, 4)
    )
    assert four["experts"] < alone["experts"]
    assert four["dispatch"] < alone["dispatch"]
    free = replace(machine, node=machine.node._replace(rate=1e30))
    gathered = blocks_on(free, costs, JobSizes(8, 8, tensor_parallel=4))[0][0].times.forward
    of_before = 2 * costs.token_bytes * 3 / 4 / machine.node.rate  # gathered and summed
    sublayers = 3  # attention, MLP, attention before the tap of a pair of top-2
    assert four[BEFORE] - gathered[BEFORE] == pytest.approx(sublayers * of_before)


def test_gradients_of_split_weights_are_summed_in_float32(counted):
    """Of a parameter in bfloat16, 2 bytes are gathered, twice, and 4 are summed."""
    profile, _, models = counted
    sizes = JobSizes(8, 8, split=True)
    block = blocks_on(profile.machine(), models["top2"].costs, sizes)[0][-1]
    in_backward = sum(each.seconds for each in block.sums)
    assert block.gathers > 0 and in_backward == pytest.approx(3 * block.gathers)
