"""timm's SwinV2 and ours, with dense blocks and copied weights, have the same logits and gradients,
with drop path too.

The tolerance is 1e-12 in float64, and 1e-6 with drop path.
"""

from __future__ import annotations

import re

import pytest
import torch

from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_model, build_model_on_meta, build_module
from tests.support.models import assert_close, gradients, randomise

pytest.importorskip("timm", reason="the extra `vision` is not installed: timm")
import timm
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.optim import create_optimizer_v2

pytestmark = pytest.mark.peers

OURS = {  # timm's names, and ours
    r"patch_embed\.": "patches.",
    r"layers\.(\d)\.downsample\.": r"merges.\1.",
    r"layers\.(\d)\.blocks\.(\d+)\.attn\.": r"stages.\1.\2.sublayers.0.f.attention.",
    r"layers\.(\d)\.blocks\.(\d+)\.norm1\.": r"stages.\1.\2.sublayers.0.after.norm.",
    r"layers\.(\d)\.blocks\.(\d+)\.mlp\.fc1\.": r"stages.\1.\2.sublayers.1.f.w_in.",
    r"layers\.(\d)\.blocks\.(\d+)\.mlp\.fc2\.": r"stages.\1.\2.sublayers.1.f.w_out.",
    r"layers\.(\d)\.blocks\.(\d+)\.norm2\.": r"stages.\1.\2.sublayers.1.after.norm.",
    r"head\.fc\.": "head.",
}


def our_name(name: str) -> str:
    for theirs, ours in OURS.items():
        name = re.sub(f"^{theirs}", ours, name)
    return name


def config_of(*overrides: str) -> Config:
    words = (
        "model.family=swin model.layers=4 model.dim=12 model.heads=2 model.patch_size=2"
        " model.window=4"
    )
    data = (
        "moe.architecture=dense data.name=digits data.image_size=64 data.num_classes=7"
        " model.drop_path=0.3"
    )
    return load_config(None, [*words.split(), *data.split(), *overrides])


def both(config: Config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return timm's model and ours with the same random weights, in float64."""
    model, data = config.model, config.data
    theirs = SwinTransformerV2(
        img_size=data.image_size,
        patch_size=model.patch_size,
        num_classes=data.num_classes,
        embed_dim=model.dim,
        depths=(2, 2, model.layers, 2),
        num_heads=tuple(model.heads * 2**stage for stage in range(4)),
        window_size=model.window,
        drop_path_rate=model.drop_path,
    )
    ours = build_model(config)
    assert [m.drop_prob for m in theirs.modules() if hasattr(m, "drop_prob")][::2] == pytest.approx(
        [block.sublayers[0].after.drop_path.drop_prob for block in ours.blocks][1:]
    ), "timm has no drop path where the rate is 0"
    randomise(ours)
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights.pop(our_name(name)) for name in theirs.state_dict()})
    assert not weights, "every weight is copied"
    return theirs.double(), ours.double()


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
def test_dense_model_equals_timms(training):
    theirs, ours = both(config_of())
    images = torch.randn(
        4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    logits = []
    for model in (theirs, ours):
        torch.manual_seed(0)  # drop path drops the same blocks of the same images
        output = model.train(training)(images)
        logits.append(output if model is theirs else output.logits_BC)
        logits[-1].square().mean().backward()
    tolerance = 1e-6 if training else 1e-12  # timm's drop rates are float32
    assert_close(logits[1], logits[0], tolerance, "logits")
    expected = {our_name(name): grad for name, grad in gradients(theirs).items()}
    for name, grad in gradients(ours).items():
        assert_close(grad, expected[name], tolerance, name)


def test_initial_weights_have_timms_standard_deviations():
    """Zeros and ones are equal, and standard deviations are equal up to the sampling error."""
    config = config_of()
    theirs = both(config)[0].float()
    theirs.init_weights()
    ours = dict(build_model(config).named_parameters())
    for name, p in theirs.named_parameters():
        mine = ours[our_name(name)]
        if p.unique().numel() <= 1:
            assert torch.equal(p, mine), name
        elif p.numel() > 1000 and "patch_embed" not in name:
            assert mine.std().item() == pytest.approx(p.std().item(), rel=0.15), name


@pytest.mark.parametrize(
    ("preset", "name"),
    [("s", "swinv2_small_window8_256"), ("b", "swinv2_base_window12_192")],
    ids=("s", "b"),
)
def test_dense_presets_are_timms_models(preset, name):
    """At the size of Table 9 all names and shapes of weights are equal. The models are on `meta`
    and take no memory."""
    with torch.device("meta"):
        theirs = timm.create_model(name, img_size=192, window_size=12, num_classes=1000)
    ours = build_model_on_meta(
        load_config(f"configs/model/swinv2_moe_{preset}.yaml", ["moe.architecture=dense"])
    )
    shapes = {our_name(key): p.shape for key, p in theirs.named_parameters()}
    assert shapes == {key: p.shape for key, p in ours.named_parameters()}


def test_timms_optimizer_decays_what_a_training_decays():
    config = config_of("moe.architecture=scmoe")
    module = build_module(config)
    module.configure_model()
    groups = create_optimizer_v2(module.model, opt="adamw", weight_decay=0.1).param_groups
    decayed = {p for group in groups if group["weight_decay"] for p in group["params"]}
    trained = module.trained()
    assert decayed == {*trained.matrices, *trained.decayed}
    assert sum(len(group["params"]) for group in groups) == sum(len(group) for group in trained)
