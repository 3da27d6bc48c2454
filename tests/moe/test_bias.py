"""Selection biases move as their rules say, by the load of all batches of a step, and by nothing
else."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from scmoe.config.leaves import ConfigError
from scmoe.config.registry import ROUTERS
from scmoe.moe.router import Router, Scoring, SelectionBias, by_sign, in_proportion
from scmoe.moe.stream import move_biases
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from tests import reference
from tests.support.models import DIM, assert_close, tiny

SCORINGS = {
    "deepseek": Scoring(torch.sigmoid, sums_to_one=False, rule=by_sign, rate=0.1),
    "softmax": Scoring(rule=by_sign, rate=0.1),
    "longcat": Scoring(rule=in_proportion, rate=0.1),
}
QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


@pytest.mark.parametrize("zero_experts", (0, 4))
@pytest.mark.parametrize(
    "counts", ([4, 4, 4, 4, 4], [0, 0, 20, 0, 0], [3, 5, 4, 8, 0], [0, 0, 0, 0, 0]), ids=str
)
@pytest.mark.parametrize("router", SCORINGS)
def test_rules_equal_their_closed_form(router, counts, zero_experts):
    """20 copies of experts and 16 of 4 zero experts have a fair share of 4: an expert with 4 stays
    where it is."""
    bias = SelectionBias(5, zero_experts, SCORINGS[router]).double()
    with torch.no_grad():
        bias.weight.copy_(torch.arange(5.0 + zero_experts) / 7)
    all_copies = 20 + 4 * zero_experts
    expected = reference.moved_bias(bias.weight.tolist(), counts, all_copies, router, 0.1)
    before = bias.weight.clone()
    bias.move(torch.tensor(counts), torch.tensor(all_copies))
    assert_close(bias.weight, torch.tensor(expected, dtype=torch.float64), 1e-15)
    assert all(bias.weight[i] == before[i] for i, c in enumerate(counts) if c == 4)


def test_a_step_of_a_bias_is_not_rounded_away_in_a_model_of_bfloat16():
    """From 0.5 on, bfloat16 has steps of 0.004."""
    router = Router(DIM, 4, 2, scoring=SCORINGS["deepseek"]).to(torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    with torch.no_grad():
        router.bias.weight.fill_(0.5)
    router.bias.step = 1e-3
    router.bias.move(torch.tensor([0, 0, 0, 4]), torch.tensor(4))
    assert_close(
        router.to(torch.bfloat16).bias.weight, torch.tensor([0.501, 0.501, 0.501, 0.499]), 1e-7
    )
    assert {p.dtype for p in Router(DIM, 4, 2).double().parameters()} == {torch.float64}


class Loads(Callback):
    """Keeps the load of a step up to each batch, and the biases after it."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] = []
        self.biases: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.sums.append(outputs["step_sums_LE2"])
        self.biases.append(
            torch.stack([b.moe.router.bias.weight.clone() for b in module.model.blocks])
        )


@pytest.mark.parametrize("router, zero_experts", [("deepseek", 0), ("longcat", 3)])
def test_a_bias_moves_once_a_step_by_all_batches_of_it_and_not_by_validations(router, zero_experts):
    words = (
        f"moe.router={router}",
        "moe.bias_rate=0.1",
        f"moe.zero_experts={zero_experts}",
        "moe.top_k=2",
    )
    words += ("model.layers=4", "optim.lr=0.02", "trainer.accumulate=3", "trainer.max_steps=2")
    config, loads = tiny(*words, "data.global_batch_size=6", "data.val_sequences=4"), Loads()
    sizes = {
        "max_steps": 2,
        "accumulate_grad_batches": 3,
        "val_check_interval": 1,
        "limit_val_batches": 1,
    }
    trainer = Trainer(accelerator="cpu", callbacks=[loads], **sizes, **QUIET)
    trainer.fit(build_module(config), build_datamodule(config))
    assert len(loads.sums) == 6
    expected = torch.zeros_like(loads.biases[0])
    for batch, biases in enumerate(loads.biases):
        assert torch.equal(loads.sums[batch][:, -2], (batch % 3 + 1) * loads.sums[0][:, -2]), (
            "tokens so far"
        )
        if batch % 3 == 2:
            for layer, (*counts, tokens, _) in enumerate(loads.sums[batch].tolist()):
                moved = reference.moved_bias(
                    expected[layer].tolist(), counts, 2 * tokens, router, 0.1
                )
                expected[layer] = torch.tensor(moved)
            assert batch > 2 or expected.abs().max() > 1e-3
        assert_close(biases, expected, 1e-7)  # float32


def test_a_refused_update_moves_no_bias(monkeypatch):
    module = build_module(
        tiny("moe.router=deepseek", "data.global_batch_size=2", "trainer.max_steps=1")
    )
    honest = type(module).task_loss
    monkeypatch.setattr(
        type(module),
        "task_loss",
        lambda self, batch: (honest(self, batch)[0] * torch.nan, *honest(self, batch)[1:]),
    )
    with pytest.raises(FloatingPointError):
        Trainer(accelerator="cpu", max_steps=1, **QUIET).fit(
            module, build_datamodule(tiny("data.global_batch_size=2"))
        )
    assert all(not block.moe.router.bias.weight.any() for block in module.model.blocks)


def test_a_shared_module_moves_once_by_the_load_of_both_blocks():
    model = build_model(
        tiny("moe.architecture=dgmoe_share", "model.layers=4", "moe.router=longcat")
    )
    first, second = (block.moe.router for block in model.blocks)
    assert first is second
    sums = torch.tensor([[5, 3, 0, 0, 0, 0, 8, 0], [0, 1, 1, 1, 1, 4, 8, 0]])
    move_biases(model, sums)
    expected = reference.moved_bias([0.0] * 6, sums.sum(0).tolist()[:6], 16, "longcat", 0.1)
    assert_close(first.bias.weight, torch.tensor(expected), 1e-8)


def test_sums_of_other_modules_than_those_of_the_blocks_are_refused():
    model = build_model(tiny("moe.router=longcat"))
    with pytest.raises(ValueError, match="contain 1 MoE modules and return the sums of 2"):
        move_biases(model, torch.zeros(2, 8, dtype=torch.int64))
    move_biases(build_model(tiny()), torch.zeros(2, 8, dtype=torch.int64))


def test_a_rate_of_0_keeps_the_bias_as_it_is():
    for words in ((), ("moe.router=deepseek",)):
        model = build_model(tiny("moe.bias_rate=0", *words))
        move_biases(model, torch.tensor([[5, 3, 0, 0, 0, 0, 8, 0]]))
        assert not model.blocks[0].moe.router.bias.weight.any()


def test_an_ablation_is_ten_lines_of_an_extension(monkeypatch):
    """DeepSeek's rule on softmax scores whose weights are raw, and a rule of one's own."""
    monkeypatch.setattr(ROUTERS, "makers", dict(ROUTERS.makers))

    @ROUTERS.register("signed_softmax")
    def signed_softmax(config):
        return Scoring(normalise=False, rule=by_sign, rate=0.01)

    @ROUTERS.register("clipped_sigmoid")
    def clipped_sigmoid(config):
        return Scoring(
            torch.sigmoid,
            sums_to_one=False,
            rule=lambda load_E: (1 - load_E).clamp(-0.5, 0.5),
            rate=0.1,
        )

    ROUTERS.register("plain")(lambda config: Scoring())
    routers = [
        build_model(tiny(f"moe.router={n}")).blocks[0].moe.router
        for n in ("signed_softmax", "clipped_sigmoid")
    ]
    for router in routers:
        router.bias.move(torch.tensor([0, 0, 2, 2, 2, 6]), torch.tensor(12))
    signed, clipped = (router.bias.weight.tolist() for router in routers)
    assert signed == pytest.approx([0.01 / 6, 0.01 / 6, 0, 0, 0, -0.01 / 6])
    assert clipped == pytest.approx([0.025, 0.025, 0, 0, 0, -0.025])
    with pytest.raises(ConfigError, match=r"moe\.bias_rate is 0\.1, .*'plain' has no rule"):
        build_model(tiny("moe.router=plain", "moe.bias_rate=0.1"))


def test_scores_that_are_all_0_have_shares_of_0():
    scoring = Scoring(torch.sigmoid, sums_to_one=False)
    assert torch.equal(scoring.shares(torch.sigmoid(torch.full((2, 4), -200.0))), torch.zeros(2, 4))
