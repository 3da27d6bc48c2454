"""A value of the configuration reaches the object that it is for.

Tests of equality make modules and optimizers by themselves, so they would not see that a builder
drops a value.
"""

import pytest
import torch
from torch import nn

from scmoe.blocks.latent import LatentAttention, LatentSizes
from scmoe.blocks.rotary import Rotary
from scmoe.config.derived import last_step, max_steps
from scmoe.config.load import load_config
from scmoe.moe.router import Router
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import build_model, build_module
from scmoe.training.learning_rate import LearningRate
from tests.support.models import tiny
from tests.support.trainer_of import trainer_of

OPTIM = (
    "optim.lr=0.25",
    "optim.weight_decay=0.03",
    "optim.beta1=0.6",
    "optim.beta2=0.7",
    "optim.eps=1e-5",
)
MUON = ("optim.name=muon", "optim.momentum=0.8")
IMAGES = (
    *("model.family=swin", "model.window=2", "data.name=digits", "data.num_classes=10"),
    *("data.image_size=32", "data.global_batch_size=8"),
)


@pytest.mark.parametrize("words, decays", (((), [0.03, 0.0]), (MUON, [0.03, 0.03, 0.0])))
def test_the_optimizer_has_the_values_of_the_config(words, decays):
    module = build_module(tiny(*OPTIM, *words))
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    of_muon = groups[: len(groups) - 2]
    assert [group["weight_decay"] for group in groups] == decays
    assert [group["momentum"] for group in of_muon] == [0.8] * len(of_muon)
    assert all((*group["betas"], group["eps"]) == (0.6, 0.7, 1e-5) for group in groups[-2:])
    assert all(group["initial_lr"] == 0.25 for group in groups)


def test_the_module_has_the_values_of_the_config():
    words = {"trainer.gradient_clip": 0.7, "moe.load_balance_coef": 0.04, "moe.z_loss_coef": 0.002}
    rates = (
        *("optim.min_lr_ratio=0.2", "optim.warmup_steps=3", "trainer.max_steps=17"),
        *("optim.schedule=wsd", "optim.decay_steps=5"),
    )
    module = build_module(tiny(*(f"{key}={value}" for key, value in words.items()), *rates))
    assert {key: getattr(module, key.partition(".")[2]) for key in words} == words
    assert module.learning_rate == LearningRate("wsd", 17, 3, 0.2, 5)
    assert not module.refuse_overflow and not module.compiled
    buffers = (
        "moe.rows=buffers",
        "moe.overflow=refuse",
        "moe.capacity_factor=null",
        "moe.dropless_ceiling=2",
    )
    other = build_module(tiny(*buffers, "trainer.compile=true"))
    assert other.refuse_overflow and other.compiled


@pytest.mark.parametrize("words", ("", "trainer.accumulate=2", "trainer.devices=2"))
def test_tokens_are_those_of_all_ranks_and_accumulated_batches(words):
    """A step of 4 sequences of 12 tokens has 48."""
    sizes = ("data.global_batch_size=4", "data.seq_len=12", *words.split())
    for tokens, steps in ((1, 1), (48, 1), (49, 2), (480, 10)):
        config = tiny(*sizes, "trainer.max_steps=null", f"trainer.max_tokens={tokens}")
        assert max_steps(config) == last_step(config) == steps
        assert build_module(config).learning_rate.max_steps == steps
        data = build_datamodule(config)
        assert data.num_batches == steps * config.trainer.accumulate


@pytest.mark.parametrize(
    "word", ("augment=imagenet", "mixup=0.8", "cutmix=0.9", "label_smoothing=0.1")
)
def test_each_change_of_images_changes_the_first_batch(word):
    pytest.importorskip("timm", reason="needs the extra `vision`")
    pytest.importorskip("sklearn", reason="needs the extra `vision`")
    plain, changed = (
        next(iter(build_datamodule(load_config(None, [*IMAGES, *words])).train_dataloader()))
        for words in ((), (f"data.{word}",))
    )
    assert any(not torch.equal(plain[key], changed[key]) for key in ("images", "labels"))


def test_routers_are_those_of_the_config():
    plain, balanced = (
        [m for m in build_model(tiny(*words)).modules() if isinstance(m, Router)]
        for words in (("moe.noisy=true",), ("moe.balanced_routing=true",))
    )
    assert (
        plain
        and not any(router.deal for router in plain)
        and all(router.noise is not None for router in plain)
    )
    assert all(router.deal and router.noise is None for router in balanced)


def test_latents_are_those_of_the_config():
    sizes = {"q_rank": 7, "kv_rank": 9, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
    words = [f"model.latent.{key}={value}" for key, value in sizes.items()]
    words += ["model.family=llama", "model.attention=latent", "moe.after_norm=true"]
    for scaled, gated in ((True, False), (False, True)):
        switches = f"model.latent.scaled={scaled}", f"model.latent.gated={gated}"
        model = build_model(tiny(*words, *switches))
        found = [m for m in model.modules() if isinstance(m, LatentAttention)]
        assert found and all(m.sizes == LatentSizes(**sizes) for m in found)
        assert all(
            (m.q_scale != 1, m.kv_scale != 1, m.gate is not None) == (scaled, scaled, gated)
            for m in found
        )
    assert all(isinstance(block.after.norm, nn.RMSNorm) for block in model.blocks)


@pytest.mark.parametrize("attention", ("full", "latent"))
def test_norms_and_rotary_positions_are_those_of_the_config(attention):
    words = [
        "model.family=llama",
        f"model.attention={attention}",
        "model.norm_eps=1e-3",
        "model.rope_theta=5e4",
    ]
    latent = ["model.latent.yarn_factor=4"] if attention == "latent" else []
    model = build_model(tiny(*words, *latent))
    rotary = [m for m in model.modules() if isinstance(m, Rotary)]
    assert len(rotary) == 2 and all(
        (m.theta, m.yarn_factor) == (5e4, 4 if latent else 1) for m in rotary
    )
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.RMSNorm)}
    of_latents = {name: eps for name, eps in norms.items() if name.endswith("kv_norm")}
    assert len(of_latents) == 2 * len(latent) and set(of_latents.values()) <= {1e-6}
    assert len(norms) > 4 and {norms[name] for name in norms.keys() - of_latents.keys()} == {1e-3}


@pytest.mark.parametrize("architecture", ("top_k", "scmoe", "dense"))
def test_dropout_follows_the_embedding_and_every_sublayer(architecture):
    """Two layers have four sub-layers: attention, MLP, attention, and MLP or MoE."""
    model = build_model(tiny("model.dropout=0.1", f"moe.architecture={architecture}")).train()
    dropouts, ran = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p == 0.1], []
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, *_: ran.append(module))
    model(torch.zeros(1, 12, dtype=torch.long))
    assert len(dropouts) == len(ran) == len(set(ran)) == 5


def test_the_trainer_is_deterministic_where_the_config_says_so():
    try:
        trainer_of(tiny("trainer.deterministic=true", "trainer.accelerator=cpu"), [], [])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
