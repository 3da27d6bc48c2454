"""The alarm for a collapsed router (fault 26) ignores busy experts and short peaks, and warns once per layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Trainer

from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_module
from scmoe.training.callbacks.bookkeeping import DataPosition
from scmoe.training.callbacks.expert_load import PATIENCE, CollapseAlarm, ExpertLoad
from tests.support.models import tiny

TOKENS = 100


def window(*layers: list[int]) -> torch.Tensor:
    """Returns the load sums of layers with these copies per expert."""
    return torch.tensor([[*counts, TOKENS, 0] for counts in layers])


def alarms(alarm: CollapseAlarm, sums: torch.Tensor, times: int) -> list[str]:
    return [line for _ in range(times) for line in alarm(sums)]


def test_a_collapsed_layer_is_named_once_with_its_expert_and_share():
    alarm, sums = CollapseAlarm(), window([25, 25, 25, 25], [5, 5, 80, 10])
    assert alarms(alarm, sums, PATIENCE - 1) == []
    (line,) = alarms(alarm, sums, 1)
    assert line.startswith("MoE layer 1: the router has collapsed, expert 2 gets 80% of the tokens (fair: 25%)")
    assert alarms(alarm, window([25, 25, 25, 25], [25, 25, 25, 25]), 1) == alarms(alarm, sums, 3 * PATIENCE) == []


@pytest.mark.parametrize(
    "counts, collapsed",
    [
        ([62, 13, 13, 12], False),  # K = 1 of 4: even is 25 of 100 tokens, halfway to all is 62.5
        ([63, 13, 12, 12], True),
        ([75, 65, 30, 30], False),  # K = 2 of 4: even is 50, halfway is 75
        ([76, 64, 30, 30], True),
        ([100, 100, 0, 0], True),
        ([100, 100, 100, 100], False),  # every expert has every token: there is no choice
        ([0, 0, 0, 0], False),
    ],
)
def test_collapsed_is_more_than_halfway_from_even_to_all_tokens(counts, collapsed):
    assert bool(alarms(CollapseAlarm(), window(counts), PATIENCE)) == collapsed


def test_a_collapsed_double_gate_is_noticed():
    """Its sums count each of 50 tokens twice, and a token's two experts differ: all tokens are half of the count."""
    assert alarms(CollapseAlarm(doubled={0}), window([50, 50, 0, 0]), PATIENCE)
    assert not alarms(CollapseAlarm(doubled={0}), window([35, 35, 15, 15]), PATIENCE)
    assert not alarms(CollapseAlarm(), window([50, 50, 0, 0]), PATIENCE)
    assert not alarms(CollapseAlarm(doubled={1}), window([50, 50, 0, 0]), PATIENCE), "Swin's other stage has one gate"


def test_a_break_resets_the_count():
    alarm = CollapseAlarm()
    for sums in [window([97, 1, 1, 1])] * (PATIENCE - 1) + [window([25, 25, 25, 25])]:
        assert alarm(sums) == []
    assert alarms(alarm, window([97, 1, 1, 1]), PATIENCE - 1) == []
    assert len(alarms(alarm, window([97, 1, 1, 1]), 1)) == 1


def train(steps: int, rigged: bool) -> list[str]:
    """Returns the collapse warnings of a run. rigged: the second MoE layer's gate sends every token to expert 0."""
    words = (f"trainer.max_steps={steps}", "trainer.accelerator=cpu", "trainer.log_every=1", "trainer.progress=false")
    config = tiny(*words, "model.layers=4", "moe.noisy=false", "optim.lr=1e-5", "data.global_batch_size=4")
    module = build_module(config)
    module.configure_model()
    if rigged:
        with torch.no_grad():
            block = module.model.blocks[1]
            block.tap_norm.weight.zero_()
            block.tap_norm.bias.fill_(1.0)
            block.moe.router.gate.weight[1:] = 0.0
            block.moe.router.gate.weight[0] = 1.0
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        log_every_n_steps=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[DataPosition(), ExpertLoad()],
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, build_datamodule(config))
    return [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]


def test_a_run_with_a_rigged_router_warns_in_one_line():
    assert train(PATIENCE + 3, rigged=False) == []
    (line,) = train(PATIENCE + 3, rigged=True)
    assert line.startswith("MoE layer 1: the router has collapsed, expert 0 gets 100% of the tokens")
    assert "\n" not in line
