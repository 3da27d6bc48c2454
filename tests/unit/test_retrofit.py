"""Zero experts that are added to a trained MoE: what is copied, what is drawn, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

from scmoe.config.leaves import ConfigError
from scmoe.init_from.pretrained import check_settings
from scmoe.init_from.upcycle import with_rows
from scmoe.parallel.mesh import ParallelContext
from scmoe.training.assembly.model import build_model_to_train
from tests.support.exports import FAMILIES, dense, export
from tests.support.models import assert_close, tiny, tiny_batch

TRAINED = (
    "model.layers=4",
    "moe.top_k=2",
    "moe.router=deepseek",
    "moe.capacity_factor=null",
    "moe.noisy=true",
)
ZEROS = ("moe.zero_experts=3", "moe.zero_output=zero")
OF_ROUTERS = ("router.gate.weight", "router.noise.weight", "router.bias.weight")


def start(file: Path, *words: str) -> torch.nn.Module:
    return (
        build_model_to_train(tiny(*words, f"init_from=scmoe:{file}"), ParallelContext())
        .double()
        .eval()
    )


def refusal(file: Path, *words: str) -> str:
    with pytest.raises(ConfigError, match="init_from is ") as raised:
        start(file, *words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_all_weights_are_copied_and_only_routers_have_further_rows(tmp_path):
    file = tmp_path / "model.safetensors"
    trained = export(tiny(*TRAINED), file)
    model, further = start(file, *TRAINED, *ZEROS), {}
    for name, p in trained.named_parameters():
        own = model.get_parameter(name)
        assert torch.equal(own[: len(p)], p.float()), name
        if len(own) > len(p):
            further[name] = own[len(p) :]
    blocks = [f"blocks.{i}.moe.{name}" for i in (0, 1) for name in OF_ROUTERS]
    assert sorted(further) == sorted(blocks) and {len(rows) for rows in further.values()} == {3}
    for i in (0, 1):
        bias = trained.get_parameter(f"blocks.{i}.moe.router.bias.weight")
        assert_close(further[f"blocks.{i}.moe.router.bias.weight"], bias.mean().expand(3), 1e-7)
    drawn = [rows for name, rows in further.items() if "bias" not in name]
    again, other = (start(file, *TRAINED, *ZEROS, f"seed={seed}") for seed in (tiny().seed, 7))
    for name, rows in further.items():
        assert torch.equal(again.get_parameter(name)[6:], rows)
        assert torch.equal(other.get_parameter(name)[6:], rows) == ("bias" in name)
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_rows_have_the_mean_and_variance_of_the_old_ones_in_each_feature():
    """The bounds are five standard errors of 20,000 draws: of a mean s / sqrt(n), of a deviation s
    / sqrt(2 n)."""
    generator, n = torch.Generator().manual_seed(0), 20_000
    old_ED = torch.randn(6, 5, generator=generator) * torch.tensor(
        [0.1, 1, 2, 3, 0]
    ) + torch.arange(5)
    rows_ED = with_rows(old_ED, n, "a gate")
    assert rows_ED.dtype == torch.float32 and torch.equal(rows_ED[:6], old_ED)
    new_ED, spread_D = rows_ED[6:].double(), old_ED.double().std(0, correction=0)
    assert (
        (new_ED.mean(0) - old_ED.double().mean(0)).abs() <= 5 * spread_D / math.sqrt(n) + 1e-6
    ).all()
    assert ((new_ED.std(0) - spread_D).abs() <= 5 * spread_D / math.sqrt(2 * n) + 1e-6).all()


@pytest.mark.parametrize(
    "words", ("router=deepseek top_k=2", "top_k=2 bias_rate=0", "architecture=dgmoe bias_rate=0")
)
def test_a_model_whose_zero_experts_are_never_chosen_is_the_trained_one(words, tmp_path):
    """The bias of zero experts is -inf. Softmax scores and raw weights count them, until their
    logits are -1e4 too.

    1e-12 of the logits: the gate's products have another number of rows. tests/unit/test_stream.py
    compares bits.
    """
    words = [f"moe.{word}" for word in ("capacity_factor=null", "tap_norm=shared", *words.split())]
    file, (ids, _) = tmp_path / "model.safetensors", tiny_batch(tiny(*words))
    trained, model = export(tiny(*words), file), start(file, *words, *ZEROS)
    expected = trained.float().double().eval()(ids)
    chosen, _ = model(ids)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.bias.weight[6:] = -math.inf
            block.moe.router.logits = never(block.moe.router.logits)
    logits, stats = model(ids)
    assert_close(logits, expected.logits_BSV, 1e-12)
    assert [s.counts_E.tolist() for s in stats] == [s.counts_E.tolist() for s in expected.stats]
    assert (chosen - logits).abs().max() > 1e-3, "zero experts must be chosen before"


def never(logits):
    return lambda x_TD: torch.cat(
        [logits(x_TD)[:, :6], torch.full((len(x_TD), 3), -1e4, dtype=x_TD.dtype)], 1
    )


# ---------------------------------------------------------------------- what is refused


def test_zero_experts_that_return_their_input_are_not_added_to_a_trained_model(tmp_path):
    file = tmp_path / "model.safetensors"
    export(tiny(*TRAINED), file)
    message = refusal(file, *TRAINED, ZEROS[0])
    assert "3 that return their input would change its output: set moe.zero_output=zero" in message


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ((), ZEROS[1:], "moe.zero_output is 'zero', allowed: 'input'"),
        (ZEROS[1:], (), "moe.zero_output is 'input', allowed: 'zero'"),
        (ZEROS[1:], ("moe.zero_experts=4", ZEROS[1]), "moe.zero_experts is 4, allowed: 3"),
    ],
)
def test_a_model_with_zero_experts_keeps_them(there, here, said, tmp_path):
    file = tmp_path / "model.safetensors"
    trained = export(tiny(*TRAINED, ZEROS[0], *there), file)
    assert said in refusal(file, *TRAINED, ZEROS[0], *here)
    model = start(file, *TRAINED, ZEROS[0], *there)
    assert all(
        torch.equal(model.get_parameter(name), p.float()) for name, p in trained.named_parameters()
    )


def test_weights_that_do_not_say_what_zero_experts_return_have_those_that_return_their_input():
    with pytest.raises(ValueError, match=r"moe\.zero_output is 'zero', allowed: 'input'"):
        check_settings({"moe.zero_experts": 3, "moe.zero_output": "zero"}, {"moe.zero_experts": 3})


def test_a_dense_model_gets_them_only_beside_a_shared_expert(tmp_path):
    """The weights of a standard top-k MoE's experts sum to one; what goes to a zero expert would be
    missing."""
    for family in FAMILIES:
        file, (ids, _) = tmp_path / f"{family}.safetensors", tiny_batch(tiny())
        expected = export(dense(family), file).float().double().eval()(ids).logits_BSV
        words = (*FAMILIES[family], "moe.capacity_factor=null", "moe.top_k=2", *ZEROS)
        assert_close(start(file, *words)(ids).logits_BSV, expected, 1e-12)
        assert "moe.zero_output=zero and a shared expert" in refusal(
            file, *words, "moe.architecture=top_k"
        )
        assert "moe.zero_output=zero and a shared expert" in refusal(
            file, *words, "moe.zero_output=input"
        )
