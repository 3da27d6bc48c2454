"""All ways of computing the routed experts equal a loop, and their weights do not depend on the EP
degree. Each activation equals its formula.
"""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from scmoe.moe.experts import (
    ACTIVATIONS,
    Experts,
    batched_mlps,
    choose_mlps,
    grouped_mlps,
    mlps_in_turn,
    zero_if_idle,
)
from tests import reference
from tests.support.models import assert_close, gradients, randomise

DIM, FFN, EXPERTS = 16, 24, 4
# Tolerances are relative to the largest entry. In float64 and float32 the sums have another order.
# bfloat16 is compared with a loop in float32 over the same numbers; it rounds hidden values,
# products and gradients to 8 bits, 4e-3 each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
LOADS = {
    "uneven": [5, 1, 7, 3],
    "one expert idle": [5, 0, 7, 4],
    "all to the first": [16, 0, 0, 0],
    "all to the last": [0, 0, 0, 16],
    "no rows": [0, 0, 0, 0],
}


def experts(dtype: torch.dtype = torch.float64, activation: str = "gelu") -> Experts:
    return randomise(Experts(DIM, FFN, EXPERTS, activation=activation).to(dtype))


def rows(num_rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def loop(module: Experts, x: Tensor, counts: list[int]) -> Tensor:
    pairs = zip(x.split(counts), module.w_in_eDF, module.w_out_eFD, strict=True)
    return torch.cat([reference.activate(part @ w_in, FFN) @ w_out for part, w_in, w_out in pairs])


WAYS = [(mlps_in_turn, dtype) for dtype in TOLERANCE]
WAYS += [
    (grouped_mlps, dtype) for dtype in (torch.float32, torch.bfloat16)
]  # grouped_mm has no float64


@pytest.mark.parametrize(
    ("mlps", "dtype"), WAYS, ids=lambda value: getattr(value, "__name__", str(value))
)
@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("load", LOADS)
def test_equals_a_loop_over_experts(load, activation, mlps, dtype):
    counts = LOADS[load]
    module, x = experts(dtype, activation), rows(sum(counts), dtype)
    y = mlps(x, module.w_in_eDF, module.w_out_eFD, torch.tensor(counts), module.act)
    assert y.dtype == dtype
    y.square().sum().backward()

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain, plain_x = experts(dtype, activation).to(wide), x.detach().to(wide).requires_grad_()
    expected = loop(plain, plain_x, counts)
    expected.square().sum().backward()
    assert_close(y.to(wide), expected, TOLERANCE[dtype])
    assert_close(x.grad.to(wide), plain_x.grad, TOLERANCE[dtype])
    for name, grad in gradients(module).items():  # no gradient is None
        expected_grad = plain.get_parameter(name).grad
        assert_close(grad.to(wide), expected_grad, TOLERANCE[dtype], name)
        for expert, count in enumerate(counts):
            assert bool((grad[expert] == 0).all()) == (count == 0), (name, expert)


@pytest.mark.parametrize("activation", ("gelu", "swiglu"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", (0, 1, 5))
def test_equal_loads_need_no_counts_and_batched_products_equal_the_experts_in_turn(
    share, dtype, activation
):
    """A GPU uses batched products if all experts have equally many rows. Here they run on a CPU."""
    found = []
    for mlps in (batched_mlps, mlps_in_turn):
        module, x = experts(dtype, activation), rows(share * EXPERTS, dtype)
        y = mlps(x, module.w_in_eDF, module.w_out_eFD, None, module.act)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": x.grad, **gradients(module)})
        assert_close(
            module(x, None).double(),
            module(x, torch.full((EXPERTS,), share)).double(),
            TOLERANCE[dtype],
        )
    batched, in_turn = found
    for name, expected in in_turn.items():
        assert batched[name].dtype == dtype
        assert_close(batched[name].double(), expected.double(), TOLERANCE[dtype], name)


def test_the_chosen_way_avoids_waits_of_the_host():
    def chosen(device: str, dtype: torch.dtype, counts_e: Tensor | None) -> object:
        return choose_mlps(torch.empty(8, DIM, dtype=dtype, device=device), counts_e)

    counts = torch.tensor([2, 2, 2, 2])
    assert (
        chosen("meta", torch.float32, None) is chosen("meta", torch.float64, None) is batched_mlps
    )
    assert chosen("meta", torch.bfloat16, counts) is grouped_mlps
    assert (
        chosen("meta", torch.float64, counts)
        is chosen("meta", torch.float32, counts)
        is mlps_in_turn
    )
    assert (
        chosen("cpu", torch.float32, None) is chosen("cpu", torch.bfloat16, counts) is mlps_in_turn
    )


@pytest.mark.parametrize(
    ("card", "grouped"), [((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_experts_are_grouped_on_cards_that_have_a_kernel_for_it(card, grouped, monkeypatch):
    """On other cards, and without a row, torch's grouped products wait or are not defined."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card)
    counts = torch.tensor([2, 2, 2, 2])
    with FakeTensorMode():
        chosen = [
            choose_mlps(torch.empty(number, DIM, dtype=dtype, device="cuda"), counts)
            for number, dtype in ((8, torch.bfloat16), (8, torch.float32), (0, torch.bfloat16))
        ]
    assert chosen == [grouped_mlps if grouped else mlps_in_turn, mlps_in_turn, batched_mlps]


def test_computes_in_the_dtype_of_the_rows():
    module = experts(torch.float32)
    y = module(rows(16, torch.bfloat16), torch.tensor([4, 4, 4, 4]))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and module.w_in_eDF.grad.dtype == torch.float32


def initial(expert_ids: range | None = None, key: str = "key") -> Experts:
    module = Experts(DIM, FFN, EXPERTS, expert_ids)
    module.init_weights(key, 0.5, 0.25)
    return module


def constructed(expert_ids: range | None = None) -> tuple[Experts, Experts, Experts]:
    """Return two new modules of one model, and one whose weights were drawn by a key."""
    torch.manual_seed(3)
    return (
        Experts(DIM, FFN, EXPERTS, expert_ids),
        Experts(DIM, FFN, EXPERTS, expert_ids),
        initial(expert_ids),
    )


@pytest.mark.parametrize("bounds", [(0, 4), (0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)], ids=str)
def test_weights_do_not_depend_on_the_ep_degree(bounds):
    """For any split of the experts. New modules have the scale of their fan-in, and differ."""
    shards = [constructed(range(a, b)) for a, b in pairwise(bounds)]
    first, second, drawn = constructed()
    for i, whole in enumerate((first, second, drawn)):
        for name, weight in whole.named_parameters():
            assert torch.equal(
                torch.cat([shard[i].get_parameter(name) for shard in shards]), weight
            )
            # 1,536 numbers: chance gives 0.02
            assert whole is drawn or abs(weight.std().item() * weight.shape[1] ** 0.5 - 1) < 0.1
    assert not torch.equal(first.w_in_eDF, second.w_in_eDF)


def test_neither_init_weights_nor_a_module_on_meta_uses_the_global_generator():
    torch.manual_seed(1)
    first = Experts(DIM, FFN, EXPERTS)
    state = torch.get_rng_state()
    first.init_weights("key", 0.5, 0.25)
    with torch.device("meta"):
        assert Experts(DIM, FFN, EXPERTS).w_in_eDF.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(initial().w_in_eDF, first.w_in_eDF)


def test_every_expert_tensor_and_key_differs():
    module, other = initial(), initial(key="another key")
    drawn = [
        w.flatten()
        for m in (module, other)
        for weight in m.parameters()
        for w in weight / weight.std()
    ]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            # 384 numbers: chance gives 0.05
            assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.3


def test_standard_deviations():
    module = Experts(64, 64, 8)
    module.init_weights("key", 0.02, 0.005)
    assert abs(module.w_in_eDF.std().item() / 0.02 - 1) < 0.02  # 32,768 numbers: chance gives 0.004
    assert abs(module.w_out_eFD.std().item() / 0.005 - 1) < 0.02


@pytest.mark.parametrize(("dim", "ffn_dim"), [(12, 16), (16, 12)])
def test_widths_that_break_alignment_are_refused(dim, ffn_dim):
    with pytest.raises(
        ValueError, match=f"dim is {dim} and ffn_dim is {ffn_dim}, allowed: multiples of 8"
    ):
        Experts(dim, ffn_dim, EXPERTS)


def test_the_gradient_of_an_idle_expert_is_zero_whatever_the_kernel_leaves_there():
    """Some GPUs' grouped products leave what was in memory."""
    w_eDF, counts_e = torch.ones(3, 8, 8, requires_grad=True), torch.tensor([2, 0, 5])
    left = torch.arange(3.0)[:, None, None].expand(3, 8, 8).clone()
    left[1] = torch.nan
    for _ in range(2):  # no hook stays on the parameter
        zero_if_idle(w_eDF, counts_e).backward(left)
    assert [w_eDF.grad[i].unique().tolist() for i in range(3)] == [[0], [0], [4]]
    w_eDF.grad = None
    w_eDF.backward(left)
    assert w_eDF.grad[1].isnan().all()


# ---------------------------------------------------------------------- activations


def hidden() -> Tensor:
    return (
        torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        .mul(3)
        .requires_grad_()
    )


def gelu_tanh(h: Tensor) -> Tensor:
    return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


FORMULAS = {
    "gelu": reference.gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": lambda h: h[:, :6] * torch.sigmoid(h[:, :6]) * h[:, 6:],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_equals_its_formula_and_its_derivative_autograds(name):
    act, h, plain = ACTIVATIONS[name], hidden(), hidden()
    a = act.forward(h)
    assert a.shape[1] * act.widening == h.shape[1]
    assert_close(a, FORMULAS[name](plain))
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (FORMULAS[name](plain) * weights).sum().backward()
    assert_close(act.into(h.detach(), torch.empty_like(a)), a)
    own = h.detach().clone()
    assert_close(act.into(own, own[:, : a.shape[1]]), a)
    assert_close(act.backward_into(weights, h.detach(), torch.empty_like(h)), plain.grad)
