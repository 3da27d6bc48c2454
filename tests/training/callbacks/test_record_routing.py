"""What is recorded is what the routers chose, beside a training, and ends none."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from scmoe.config.load import load_config
from scmoe.moe.layout import count
from scmoe.moe.router import Router
from scmoe.parallel.wire.wire import Wire
from scmoe.training.callbacks.record_routing import RecordRouting, RoutingProbe
from tests.support.models import hooks, tiny, tiny_batch, tiny_model

ARCHITECTURES = {
    "top_k": (2, "moe.architecture=top_k moe.top_k=2"),
    "scmoe, a capacity": (1, "moe.capacity_factor=0.5"),  # drops more than half of the copies
    "recomputed": (1, "trainer.recompute=true"),
    "dgmoe": (2, "moe.architecture=dgmoe"),
    "dgmoe_share": (2, "moe.architecture=dgmoe_share"),
    "zero experts": (2, "moe.architecture=top_k moe.top_k=2 moe.zero_experts=3"),
}


def test_a_folder_that_cannot_be_made_ends_no_training(tmp_path, capsys):
    (tmp_path / "analysis").write_text("a file")
    callback = RecordRouting(1, tmp_path / "analysis")
    callback.on_train_start(SimpleNamespace(global_step=0), None)
    callback.step, callback.probe = (
        0,
        SimpleNamespace(result=lambda: [torch.zeros(2, 1)], num_experts=2),
    )
    callback.on_train_batch_end(None, SimpleNamespace(wire=Wire()))
    assert "step-00000000.safetensors is not written" in capsys.readouterr().err


def test_a_resumed_run_removes_only_what_it_records_again(tmp_path):
    folder = tmp_path / "routing"
    folder.mkdir()
    names = {f"step-{step}.safetensors" for step in ("00000002", "00000004", "mine")}
    for name in names:
        (folder / name).touch()
    RecordRouting(1, tmp_path).on_train_start(SimpleNamespace(global_step=4), None)
    assert {path.name for path in folder.iterdir()} == names - {"step-00000004.safetensors"}


@pytest.mark.parametrize("num_choices, words", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_probe_has_what_the_gates_choose(num_choices, words):
    """A second pass computes each gate's choice from its input by hand, and the counts are those of
    the losses."""
    config = tiny("model.layers=4", "moe.num_experts=4", "moe.noisy=false", *words.split())
    model, (input_ids, _) = tiny_model(config).train(), tiny_batch(config)
    probe = RoutingProbe(model)
    logits, stats = model(input_ids)
    probe.remove()
    logits.sum().backward()
    assert hooks(model) == 0
    by_hand: list[Tensor] = []

    def choose(router: Router, args: tuple[Tensor, ...]) -> None:
        x_TD, _, excluded_T1 = (*args, None, None)[:3]
        logits_TE = x_TD @ router.gate.weight.T
        if excluded_T1 is not None:
            logits_TE = logits_TE.scatter(1, excluded_T1, -torch.inf)
        by_hand.append(logits_TE.topk(router.top_k).indices.clamp(max=4))  # 4: to no expert

    handles = [
        m.register_forward_pre_hook(choose) for m in model.modules() if isinstance(m, Router)
    ]
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    layers = probe.result()
    assert [tuple(ids_TK.shape) for ids_TK in layers] == [(input_ids.numel(), num_choices)] * 2
    assert torch.equal(torch.cat(layers, 1), torch.cat(by_hand, 1))
    for ids_TK, own in zip(layers, stats, strict=True):
        assert torch.equal(count(ids_TK.long().flatten(), 4), own.counts_E)
        assert ids_TK.dtype == torch.uint8


@pytest.mark.parametrize("architecture", ("dgmoe", "dgmoe_share"))
def test_double_gates_and_other_gates_are_recorded_in_one_model(architecture):
    """Stage 3 of SwinV2 has two pairs with a double gate at 4 x 4 places, stage 4 has a top-2 gate
    at 2 x 2."""
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = (
        *(
            "model.family=swin",
            "model.layers=4",
            "model.dim=8",
            "model.heads=1",
            "model.patch_size=2",
        ),
        *("model.window=2", "data.name=digits", "data.image_size=32", "data.num_classes=5"),
    )
    model = tiny_model(
        load_config(None, [*words, f"moe.architecture={architecture}"]), torch.float32
    )
    probe = RoutingProbe(model)
    _, stats = model(torch.randn(3, 3, 32, 32))
    layers = probe.result()
    assert [tuple(ids_TK.shape) for ids_TK in layers] == [(48, 2), (48, 2), (12, 2)]
    for ids_TK, own in zip(layers, stats, strict=True):
        assert torch.equal(count(ids_TK.long().flatten(), probe.num_experts), own.counts_E)
