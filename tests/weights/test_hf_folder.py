"""A folder of `make export FORMAT=hf` is read by transformers with equal logits, and by us with
bit-identical weights.

float32: sums of another order differ by 1e-6 of the largest logit; the bound is 1e-5.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import scmoe
from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.moe.balance import integer_sums, load_balance_loss
from scmoe.training.assembly.model import build_model_on_meta, build_model_to_train
from scmoe.weights.hf_config import hf_config
from scmoe.weights.hf_folder import evaluation_of, write_folder
from tests.support.architectures import LATENT, LATENT_ATTENTION, overrides
from tests.support.exports import write_checkpoint
from tests.support.models import assert_close, tiny_model

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `peers`)"
)
pytestmark = pytest.mark.peers

LLAMA = "model.family=llama model.kv_heads=2"
INSTELLA = " ".join(["model.family=llama", *overrides(LATENT_ATTENTION["instella"])])
LONGCAT = " ".join(["model.family=llama", *overrides(LATENT_ATTENTION["longcat"])])
DEEPSEEK = " ".join(
    [
        "model.family=llama",
        *overrides(f"architecture=shared_expert combine=direct_add every=1 top_k=2 {LATENT}"),
    ]
)
DEEPSEEK += " moe.router=deepseek moe.router_scale=2.5"
KINDS = {  # words: model_type
    "moe.architecture=dense model.activation=gelu_tanh": "gpt2",
    "moe.architecture=dense": "gpt2",
    f"{LLAMA} moe.architecture=dense moe.noisy=true": "llama",  # without a gate it has no noise
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1": "mixtral",
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1"
    " model.norm_eps=1e-6 model.rope_theta=1e6": "mixtral",
    f"{LLAMA} moe.architecture=dense model.head_dim=6": "llama",
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1 model.head_dim=6": "mixtral",
    f"{LLAMA} moe.architecture=shared_expert model.head_dim=6": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.every=4 model.layers=8": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.top_k=2 moe.every=1": "qwen2_moe",
    f"{LLAMA} moe.architecture=shared_expert moe.top_k=2 moe.renormalise=false": "qwen2_moe",
    f"{LONGCAT} moe.router=longcat moe.router_scale=6 moe.zero_experts=2 moe.ffn_dim=32": (
        "longcat_flash"
    ),
    f"{DEEPSEEK} moe.ffn_dim=8 moe.leading_dense=[40,40] model.latent.yarn_factor=4": "deepseek_v3",
    "moe.architecture=scmoe moe.capacity_factor=0.5": "scmoe",
    f"{LLAMA} moe.architecture=scmoe moe.position=pos3 moe.combine=cg2 moe.coefficient_input=tap": (
        "scmoe"
    ),
    "moe.architecture=dgmoe_share model.layers=4": "scmoe",
    f"{LLAMA} moe.router=longcat moe.top_k=2 moe.router_scale=6"
    " moe.zero_experts=2 moe.ffn_dim=32 moe.leading_dense=[40,48]": "scmoe",
    "moe.every=1 moe.after_norm=true": "scmoe",
    INSTELLA: "scmoe",
}
OURS = (  # no other model type has all of their settings
    f"{LLAMA} moe.architecture=shared_expert moe.combine=cg2",
    f"{LLAMA} moe.architecture=top_k moe.top_k=2",  # Mixtral has an MoE in every block
    f"{LLAMA} moe.architecture=top_k moe.top_k=1 moe.every=1",  # there its weight is 1
    # weights of the noise have no place there
    f"{LLAMA} moe.architecture=shared_expert moe.noisy=true",
    "moe.architecture=dense model.activation=swiglu",
    "moe.architecture=dense model.head_dim=6",  # GPT-2 has no key for it
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1 moe.router=deepseek",
    # Mixtral has no such norm
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1 moe.after_norm=true",
    f"{LLAMA} moe.architecture=top_k moe.top_k=2 moe.every=1 moe.balanced_routing=true",
    f"{LONGCAT} moe.router=longcat moe.position=pos1",
    f"{LONGCAT} moe.router=deepseek",
    f"{LONGCAT} moe.router=longcat model.latent.q_rank=null",
    f"{LONGCAT} moe.router=longcat moe.tap_norm=own moe.every=1 moe.position=pos1 model.layers=1",
    f"{DEEPSEEK} moe.ffn_dim=16",  # the shared expert is as wide as 1.5 of them
    f"{DEEPSEEK} moe.leading_dense=[40,48]",
)
LENGTH = 12
TEXT = "My fellow citizens, the state of the union: naïve 🙂 \n\n  two  spaces."


def config_of(words: str) -> Config:
    sizes = (
        "model.layers=4",
        "model.dim=16",
        "model.heads=4",
        "model.ffn_dim=24",
        "moe.num_experts=6",
    )
    data = (
        "data.name=synthetic",
        "data.vocab_size=300",
        f"data.seq_len={LENGTH}",
        "moe.capacity_factor=null",
    )
    return load_config(None, [*sizes, *data, *words.split()])


def checkpoint_of(config: Config, folder: Path) -> torch.nn.Module:
    """Write a checkpoint of a network with random weights, and return the network."""
    model = tiny_model(config, torch.float32).eval()
    write_checkpoint(model, folder, step=3)
    return model


def ids() -> torch.Tensor:
    return torch.randint(300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def exported(words: str, folder: Path, **how: Any) -> tuple[torch.nn.Module, str]:
    config = config_of(words)
    model = checkpoint_of(config, folder / "step=3.ckpt")
    return model, write_folder(
        folder / "step=3.ckpt", folder / "hf", config, build_model_on_meta(config), **how
    )


def theirs(folder: Path, **how: Any) -> Any:
    import scmoe.hf  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@pytest.mark.parametrize("words", KINDS)
def test_logits_and_weights(words, tmp_path):
    model, kind = exported(words, tmp_path)
    assert kind == KINDS[words]
    ours, loaded = scmoe.load(tmp_path / "hf"), theirs(tmp_path / "hf")
    assert type(loaded).__module__.startswith("scmoe." if kind == "scmoe" else "transformers.")
    for name, p in model.named_parameters():
        assert torch.equal(p, ours.get_parameter(name)), name
    assert not ours.training
    with torch.inference_mode():
        assert_close(loaded(ids()).logits, ours(ids()).logits_BSV, 1e-5)
        if "capacity" not in words:  # a folder's model drops nothing
            assert_close(ours(ids()).logits_BSV, model(ids()).logits_BSV, 1e-5)
    if kind != "scmoe":  # weights of the folder start another training
        started = build_model_to_train(config_of(f"{words} init_from=hf:{tmp_path / 'hf'}"))
        for name, p in model.named_parameters():
            assert torch.equal(p, started.get_parameter(name)), name


@pytest.mark.parametrize("words", OURS)
def test_settings_that_no_other_model_type_has_are_of_ours(words):
    assert hf_config(config_of(words), None)["model_type"] == "scmoe"


def test_a_large_model_is_written_in_several_files(tmp_path):
    words = f"{LLAMA} moe.architecture=shared_expert"
    model, _ = exported(words, tmp_path, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "hf").glob("model*"))
    assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "hf" / files[-1]).read_text())
    assert set(index["weight_map"].values()) == set(files[:-1])
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    with torch.inference_mode():
        assert_close(
            theirs(tmp_path / "hf")(ids()).logits,
            scmoe.load(tmp_path / "hf")(ids()).logits_BSV,
            1e-5,
        )
    write_folder(
        tmp_path / "step=3.ckpt",
        tmp_path / "hf",
        config_of(words),
        build_model_on_meta(config_of(words)),
    )
    assert [path.name for path in (tmp_path / "hf").glob("model*")] == ["model.safetensors"], (
        "old files are gone"
    )


@pytest.mark.parametrize("words", ["moe.architecture=scmoe", "moe.architecture=dense"])
def test_an_export_replaces_only_exports_of_its_model(words, tmp_path):
    """Its own are replaced, a killed one's too. transformers saves a fine-tuned model under the
    same names."""
    exported(words, tmp_path)
    config, folder = config_of(words), tmp_path / "hf"
    write_folder(tmp_path / "step=3.ckpt", folder, config, build_model_on_meta(config))
    (folder / ".tmp-0123abcd-model.safetensors").write_bytes(b"half a header")
    (folder / "config.json").unlink()
    scmoe_files = {"generation_config.json", "README.md", "config.json", "model.safetensors"}
    write_folder(tmp_path / "step=3.ckpt", folder, config, build_model_on_meta(config))
    assert {path.name for path in folder.iterdir()} == scmoe_files

    def assert_refused(folder: Path, config: Config) -> None:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            write_folder(tmp_path / "step=3.ckpt", folder, config, build_model_on_meta(config))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    assert_refused(folder, config_of(f"{words} init_from=hf:{folder}"))
    theirs(folder).save_pretrained(tmp_path / "tuned")
    assert_refused(tmp_path / "tuned", config)
    kept = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(kept | {"vocab_size": 301}))
    assert_refused(folder, config)


def test_generation_has_no_length_that_warns(tmp_path):
    exported("moe.architecture=scmoe", tmp_path)
    assert "max_length" not in json.loads((tmp_path / "hf" / "generation_config.json").read_text())


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_folder_never_has_half_of_a_file(name, tmp_path, monkeypatch):
    write_text = Path.write_text

    def full_disk(path: Path, text: str, *how: Any, **named: Any) -> None:
        write_text(path, text[:9] if path.name.endswith(name) else text, *how, **named)
        if path.name.endswith(name):
            raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        exported("moe.architecture=scmoe", tmp_path, tokenizer=make_tokenizer("bpe", 300, [TEXT]))
    assert (tmp_path / "hf" / "model.safetensors").exists() and not list(
        (tmp_path / "hf").glob(f"*{name}")
    )


@pytest.mark.parametrize("family", ["scmoe", "gpt2", "mixtral"])
def test_a_config_of_a_folder_that_is_not_whole_is_refused(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(ValueError, match=r"config\.json"):
        scmoe.load(tmp_path)


def test_the_tokenizer_gives_the_same_ids(tmp_path):
    tokenizer = make_tokenizer("bpe", 300, [TEXT * 3])
    exported("moe.architecture=scmoe", tmp_path, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert (
        loaded.eos_token_id == tokenizer.end_of_text == theirs(tmp_path / "hf").config.eos_token_id
    )


@pytest.mark.parametrize(
    ("words", "use_cache"),
    [
        ("moe.architecture=scmoe", True),
        ("moe.architecture=scmoe", False),
        (f"{LLAMA} moe.architecture=dgmoe moe.noisy=false", True),
        (INSTELLA, True),
    ],
)
def test_padding_on_the_left_changes_no_token(words, use_cache, tmp_path):
    """Each text of a batch continues as alone, and as the network itself says without a cache. In
    float64."""
    exported(words, tmp_path)
    model, lengths, new, seen = theirs(tmp_path / "hf").double(), (2, 6, 4), 6, []
    ours = scmoe.load(tmp_path / "hf").double()
    texts = [ids()[0, :length] for length in lengths]
    padded = torch.stack(
        [torch.nn.functional.pad(text, (max(lengths) - len(text), 0)) for text in texts]
    )
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    how = {"max_new_tokens": new, "do_sample": False, "use_cache": use_cache}
    model.model.tokens.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    together = model.generate(padded, attention_mask=mask.long(), **how)[:, max(lengths) :]
    assert seen == (
        [max(lengths)] + [1] * (new - 1)
        if use_cache
        else [*range(max(lengths), max(lengths) + new)]
    )
    assert len(set(together.flatten().tolist())) > 6
    for row, text in enumerate(texts):
        expected = text[None]
        with torch.inference_mode():
            for _ in range(new):
                expected = torch.cat(
                    [expected, ours(expected).logits_BSV[:, -1:].argmax(-1)], dim=1
                )
        assert torch.equal(together[row], expected[0, len(text) :])
        assert torch.equal(
            model.generate(text[None], attention_mask=torch.ones(1, len(text)), **how), expected
        )


def test_the_registered_class_is_saved_and_refuses_what_it_does_not_read(tmp_path):
    exported("moe.architecture=scmoe", tmp_path)
    model, mask = theirs(tmp_path / "hf"), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, -3:] = 0
    with torch.inference_mode():
        alone = model(ids()[:1, :-3]).logits[0]
        assert_close(model(ids(), attention_mask=mask).logits[0, :-3], alone, 1e-5)
        assert len(model(ids(), use_cache=False, return_dict=False)) == 1
        assert model(ids(), logits_to_keep=1).logits.shape[1] == 1
    static = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    wrong_ones = (
        {"position_ids": ids()[:, 1:]},
        {"token_type_ids": ids()},
        {"inputs_embeds": ids()},
        {"attention_mask": mask[:, 1:]},
        {"cache": static},
    )
    for wrong in wrong_ones:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model(ids(), **wrong)
    model.save_pretrained(tmp_path / "again")
    again = scmoe.load(tmp_path / "again")
    for name, p in model.model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name


def test_routers_stay_in_float32_in_a_model_of_bfloat16(tmp_path):
    """As in a training: bfloat16 would round steps of a selection bias away, and choices would
    differ."""
    exported("moe.architecture=scmoe moe.router=deepseek", tmp_path)
    model = theirs(tmp_path / "hf", dtype=torch.bfloat16)
    of_routers = {name: p.dtype for name, p in model.named_parameters() if ".router." in name}
    assert len(of_routers) > 1 and {*of_routers.values()} == {torch.float32}
    assert (
        model.model.tokens.weight.dtype == torch.bfloat16 and model(ids()).logits.isfinite().all()
    )


def test_weights_that_a_folder_lacks_are_drawn_as_for_a_training(tmp_path):
    exported("moe.architecture=scmoe", tmp_path)
    whole, file = theirs(tmp_path / "hf"), tmp_path / "hf" / "model.safetensors"
    fresh = transformers.AutoModelForCausalLM.from_config(whole.config)
    assert fresh.model.tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert fresh(ids(), labels=ids()).loss.item() == pytest.approx(math.log(300), abs=0.1)
    weights, gone = load_file(file), "model.blocks.0.moe.experts.w_in_eDF"
    del weights[gone]
    save_file(weights, file, {"format": "pt"})
    read = dict(theirs(tmp_path / "hf").named_parameters())
    assert read.pop(gone).std().item() == pytest.approx(0.02, rel=0.1)
    for name, p in read.items():
        assert torch.equal(p, whole.get_parameter(name)), name


def test_losses_of_accumulated_batches_add_up_to_that_of_one_batch(tmp_path):
    """transformers' Trainer gives the number of labels of all batches, and does not divide by the
    number of batches."""
    exported("moe.architecture=scmoe", tmp_path)
    model, labels = theirs(tmp_path / "hf").double(), ids().clone()
    labels[0, :5] = -100
    model(ids(), labels=labels).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    assert model.accepts_loss_kwargs
    parts = [
        model(
            row[None], labels=own[None], num_items_in_batch=torch.tensor(LENGTH - 5 + LENGTH - 1)
        ).loss
        for row, own in zip(ids(), labels, strict=True)
    ]
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(model(ids(), labels=labels).loss.item())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_the_load_balance_loss_is_added_where_router_logits_are_asked_for(tmp_path):
    exported("moe.architecture=scmoe moe.load_balance_coef=0.5", tmp_path)
    model = theirs(tmp_path / "hf")
    stats = scmoe.load(tmp_path / "hf")(ids()).stats
    balance = load_balance_loss(stats, integer_sums(stats)).item()
    plain, found = model(ids(), labels=ids()), model(ids(), labels=ids(), output_router_logits=True)
    assert plain.aux_loss is None and found.aux_loss.item() == pytest.approx(balance)
    assert found.loss.item() == pytest.approx(plain.loss.item() + 0.5 * balance)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 2.0
    assert model(ids(), labels=ids()).loss.item() == pytest.approx(plain.loss.item() + 2 * balance)


@pytest.mark.parametrize("words", ["moe.architecture=scmoe moe.top_k=2", "moe.architecture=dense"])
def test_the_model_card_says_what_the_model_is_and_loads_it(words, tmp_path, monkeypatch):
    words += " data.name=text data.path=/data/hidden/texts"
    metrics = [{"step": step, "val/loss": 5.0 - step} for step in range(4)]
    tokenizer = make_tokenizer("bpe", 300, [TEXT])
    model, kind = exported(words, tmp_path, tokenizer=tokenizer, metrics=metrics)
    card = tmp_path / "hf" / "README.md"
    _, head, text = card.read_text().split("---\n")
    about = yaml.safe_load(head)
    assert about["library_name"] == "transformers" and about["license"] == "unknown"
    assert "after 3 steps: 3.0000 nats" in text and "pip install" in text
    assert (
        f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
        and "for 3 of 200" in text
    )
    assert ("2 of 6 experts" in text) == (
        kind == "scmoe"
    ) and "/data/hidden" not in card.read_text()
    (code,), (settings,) = (
        re.findall(f"```{name}\n(.*?)```", text, re.DOTALL) for name in ("python", "yaml")
    )
    assert yaml.safe_load(settings)["model"]["dim"] == 16 and ("import scmoe.hf" in code) == (
        kind == "scmoe"
    )
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path / "hf")
    exec(code, names)  # it is run as it is, beside the card
    assert names["model"].config.model_type == kind and names["tokenizer"].eos_token_id is not None
    assert "a perplexity of inf" in evaluation_of([{"val/loss": 1000.0, "step": 0.0}], 1)
    card.write_text("edited")
    write_folder(
        tmp_path / "step=3.ckpt",
        tmp_path / "hf",
        config_of(words),
        build_model_on_meta(config_of(words)),
    )
    assert card.read_text() == "edited"
