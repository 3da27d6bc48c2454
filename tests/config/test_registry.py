"""What is registered is checked, listed and built like what comes with scmoe; what cannot handle it
says so."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import docs.examples.my_architecture  # noqa: F401  else the fixture would forget what it registers
from scmoe.blocks.farskip import FarSkipBlock
from scmoe.blocks.shortcut import ShortcutBlock
from scmoe.command_line import call
from scmoe.config.help import catalogue
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.config.registry import (
    ARCHITECTURES,
    CALLBACKS,
    DATASETS,
    FAMILIES,
    OPTIMIZERS,
    ROUTERS,
    Registry,
    words,
)
from scmoe.models.decoder import GPT
from scmoe.models.model_cost import parts as parts_of
from scmoe.moe.router import Router, Scoring
from scmoe.predict.costs import estimate
from scmoe.training.assembly.blocks import decoder_parts, moe_blocks, stack
from scmoe.training.assembly.data import build_datamodule
from scmoe.training.assembly.model import (
    OF_A_NETWORK,
    build_model,
    build_model_on_meta,
    build_module,
)
from scmoe.training.run.train import checked_model
from scmoe.weights.hf_config import hf_config
from scmoe.weights.pretrained import model_settings
from tests.support.models import TINY

EXTENSION = "extensions=[docs.examples.my_architecture]"
PARALLEL = (EXTENSION, "moe.architecture=parallel")


@pytest.fixture(autouse=True)
def kept_registries(monkeypatch):
    """What a test registers is forgotten."""
    for registry in (ARCHITECTURES, CALLBACKS, FAMILIES, DATASETS, ROUTERS):
        monkeypatch.setattr(registry, "makers", dict(registry.makers))


@pytest.mark.parametrize(
    "registry", [ARCHITECTURES, FAMILIES, DATASETS, OPTIMIZERS], ids=lambda r: r.kind
)
def test_the_built_in_names_are_those_that_scmoe_registers(registry):
    own = [name for name, make in registry.makers.items() if make.__module__.startswith("scmoe.")]
    assert sorted(own) == sorted(registry.built_in)


def test_registered_names_are_allowed_and_listed(capsys):
    load_config(None, [EXTENSION])
    with pytest.raises(ConfigError, match=r"moe\.architecture is 'x', .*farskip .*parallel"):
        load_config(None, ["moe.architecture=x"])
    found = catalogue()
    assert ("moe.architecture=parallel", "") in found["Architectures"] and (
        "optim.name=sgd",
        "",
    ) in found["Optimizers"]
    assert ("data.name=counting", "") in found["Data sets"] and found["Callbacks"] == [
        ("callbacks.surprise", "")
    ]
    assert call("list", EXTENSION) == 0 and "callbacks.surprise" in capsys.readouterr().out


def test_a_registry_keeps_what_it_was_given():
    registry = Registry("thing", ("a",))
    assert registry.register("b", images=True)(print) is print and registry["b"] is print
    assert (registry.names(), registry.images) == (("a", "b"), ["b"])


@pytest.mark.parametrize(
    "word",
    [
        *(
            "schedule.auto=true",
            "offload.way=blocking",
            "analysis.gating_every=1",
            "analysis.similarity_every=1",
            "analysis.gradients_every=1",
        ),
        "analysis.record_routing=1",
    ],
)
def test_what_needs_scmoes_own_blocks_is_refused(word):
    with pytest.raises(
        ConfigError,
        match=rf"{word.partition('=')[0]} is .* as moe\.architecture=parallel is an ext",
    ):
        load_config(None, [*PARALLEL, word])


def test_fields_that_an_extension_may_read_are_free():
    words = (
        "moe.position=pos1 moe.first_position=pos3 moe.tap_norm=shared moe.combine=cg2"
        " schedule.slot=9 options.a=1"
    )
    config = load_config(None, [*PARALLEL, *words.split()])
    kept = model_settings(config)
    assert (kept["moe.position"], kept["moe.combine"], kept["options"]) == ("pos1", "cg2", {"a": 1})


def test_costs_are_estimated_from_the_modules_and_an_export_for_hugging_face_is_refused():
    config = load_config(None, [*TINY, *PARALLEL])
    facts, scmoe = (
        estimate(load_config(None, [*TINY, *words]))
        for words in (PARALLEL, ("moe.every=1", "moe.position=pos1"))
    )
    assert facts["all_to_all_bytes_forward"] == scmoe["all_to_all_bytes_forward"] > 0
    assert 0 < facts["flops_forward"] < scmoe["flops_forward"], "it has no shared expert"
    with pytest.raises(ValueError, match=r"an extension defines moe\.architecture=parallel"):
        hf_config(config, None)
    ROUTERS.register("mine")(lambda config: Scoring())
    with pytest.raises(ValueError, match=r"an extension defines moe\.router=mine"):
        hf_config(load_config(None, [*TINY, "moe.router=mine"]), None)


def test_the_scale_of_a_router_is_kept_and_the_configuration_multiplies_it():
    ROUTERS.register("mine")(lambda config: Scoring(scale=2.5))
    for factor, scale in ((1, 2.5), (2, 5.0)):
        model = build_model(
            load_config(None, [*TINY, "moe.router=mine", f"moe.router_scale={factor}"])
        )
        assert model.blocks[0].moe.router.scoring.scale == scale


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (Scoring(torch.sigmoid), "sums_to_one"),
        (Scoring(lambda logits: -logits, sums_to_one=False), "finite, 0 or more"),
        (Scoring(lambda logits: torch.sigmoid(-logits), sums_to_one=False), "does not increase"),
        (Scoring(lambda logits: logits.sum(), sums_to_one=False), "equal shapes"),
        (Scoring(torch.nn.functional.gumbel_softmax, scale=-1.0), "scale"),
        (Scoring(lambda logits: logits.no_such_method()), "AttributeError"),
        ("softmax", "must return a Scoring"),
    ],
)
def test_a_router_that_gives_no_usable_weights_is_refused_by_its_name_at_the_start(made, wrong):
    ROUTERS.register("mine")(lambda config: made)
    with pytest.raises(
        ConfigError, match=rf"moe\.router is 'mine' \(tests\.config\.test_registry.*{wrong}"
    ):
        checked_model(load_config(None, [*TINY, "moe.router=mine"]))


def test_a_score_may_make_tensors_and_reach_its_highest_value():
    def clipped(logits):
        return (logits + torch.linspace(0, 1, logits.shape[-1])).clamp(0, 1)

    ROUTERS.register("mine")(lambda config: Scoring(clipped, sums_to_one=False))
    build_model_on_meta(load_config(None, [*TINY, "moe.router=mine"]))


class Turned(Router):
    """The router of scmoe on turned logits."""

    def logits(self, x_TD):
        return super().logits(-x_TD)


def test_an_architecture_may_reuse_pairs_and_bring_a_router():
    class Mine(ShortcutBlock):
        pass

    @ARCHITECTURES.register("mine")
    def mine(config, wire, parts):
        return moe_blocks(Mine, config, wire, parts)

    @ARCHITECTURES.register("turned")
    def turned(config, wire, parts):
        blocks = moe_blocks(ShortcutBlock, config, wire, parts)
        for block in blocks:
            block.moe.router = Turned(parts[0].dim, config.moe.num_experts, config.moe.top_k)
        return blocks

    tokens = torch.arange(8)[None]
    models = {
        name: build_model(load_config(None, [*TINY, f"moe.architecture={name}"]))
        for name in ("scmoe", "mine", "turned")
    }
    logits = {name: model.eval()(tokens)[0] for name, model in models.items()}
    assert isinstance(models["mine"].blocks[0], Mine) and torch.equal(
        logits["mine"], logits["scmoe"]
    )
    assert not torch.equal(logits["turned"], logits["scmoe"])
    own, scmoes = (
        Counter(kind for kind, *_ in parts_of(models[name])) for name in ("turned", "scmoe")
    )
    assert own == scmoes and own["gates"] > 0, "a router of one's own counts as a gate"


def test_a_subclass_of_farskips_block_gets_its_parts():
    class Skips(FarSkipBlock):
        pass

    ARCHITECTURES.register("skips")(
        lambda config, wire, parts: moe_blocks(Skips, config, wire, parts)
    )
    words = (*TINY, "moe.every=1", "moe.leading_dense=[16]")
    own, ours = (
        build_model(load_config(None, [*words, f"moe.architecture={name}"]))
        for name in ("skips", "farskip")
    )
    tokens = torch.arange(8)[None]
    assert torch.equal(own.eval()(tokens)[0], ours.eval()(tokens)[0])


def test_a_family_puts_its_model_around_any_architecture():
    @FAMILIES.register("narrow")
    def narrow(config, wire):
        parts = decoder_parts(config, norm=nn.LayerNorm, activation="gelu_tanh")
        blocks = stack(config, wire, [parts] * config.model.layers)
        return GPT(config.data.vocab_size, config.data.seq_len, config.model.dim, blocks)

    FAMILIES.register("bare")(lambda config, wire: nn.Linear(2, 2))
    config = load_config(None, [*TINY, "model.family=narrow"])
    model = build_model(config)
    logits, stats = model(torch.zeros(1, 4, dtype=torch.int64))
    assert logits.shape == (1, 4, 64) and len(stats) == 1 and build_module(config)
    with pytest.raises(ConfigError, match=r"'bare', whose network lacks blocks, steps"):
        build_model_on_meta(load_config(None, [*TINY, "model.family=bare"]))


def test_a_family_without_halves_is_refused_two_batches_before_ranks_start():
    """The network that is checked there is built for one rank."""
    whole: Any = nn.Module()
    vars(whole).update(dict.fromkeys(OF_A_NETWORK, len))
    FAMILIES.register("whole")(lambda config, context: whole)
    two = ("trainer.devices=2", "schedule.batches_in_flight=2", "model.family=whole")
    with pytest.raises(ConfigError, match="has no Halves"):
        build_model_on_meta(load_config(None, [*TINY, *two]))


def test_images_go_with_models_of_images(monkeypatch):
    monkeypatch.setattr(FAMILIES, "images", list(FAMILIES.images))
    DATASETS.register("mine")(lambda config, position: None)
    FAMILIES.register("vit", images=True)(print)
    with pytest.raises(ConfigError, match=r"data\.name is 'mine', .*image_folder"):
        load_config(None, ["data.name=mine", "model.family=vit"])
    assert load_config(
        None, ["data.name=digits", "model.family=vit", "model.ffn_dim=64", "model.dropout=0.1"]
    )
    assert load_config(None, ["data.name=mine", "data.vocab_size=10", "data.path=x"])


def test_a_data_set_reads_its_options():
    config = load_config(None, [*TINY, EXTENSION, "data.name=counting", "options.stride=3"])
    data = build_datamodule(config)
    data.setup("fit")
    assert data.splits.tokens["train"][:4].tolist() == [0, 3, 6, 9]


def test_the_words_that_name_callbacks_again_are_read_as_they_were():
    options = {
        "label": "step #1: a [b",
        "every": 3,
        "on": True,
        "off": None,
        "path": "a/b-c.txt",
        "list": [1, "x y", "1e3"],
        "texts that look like values": {"a": "007", "b": "1e3", "c": "true", "d": "null", "e": ""},
        "signs": "\U0001f600 \x7f \x85 \u2028",
    }
    CALLBACKS.register("mine")(lambda **_: None)
    given = words(["my_architecture"], {"mine": options})
    assert given[0] == "extensions=[my_architecture]" and "callbacks.mine.path=a/b-c.txt" in given
    assert load_config(None, given[1:]).callbacks == {"mine": options}


def test_frozen_experts_are_not_trained_and_all_else_is():
    @ARCHITECTURES.register("frozen")
    def frozen(config, wire, parts):
        blocks = moe_blocks(ShortcutBlock, config, wire, parts)
        for block in blocks:
            block.moe.experts.requires_grad_(False)
        return blocks

    module = build_module(load_config(None, [*TINY, "moe.architecture=frozen"]))
    module.configure_model()
    trained = {p for group in module.trained() for p in group}
    assert {name for name, p in module.named_parameters() if p not in trained} == {
        name for name, _ in module.named_parameters() if ".experts." in name
    }
