"""transformers' Trainer evaluates, predicts and keeps the best model of type scmoe; TRL's trainers
tune it by texts in a row (SFT), by adapters of PEFT and by preferences (DPO). Mixtral is a control.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.hf_models import ids, model_of
from tests.support.models import assert_close

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (extra `peers`)"
)
pytest.importorskip("accelerate", reason="accelerate is not installed (extra `peers`)")
pytestmark = pytest.mark.peers

HOW = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 2}
WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
TEXTS = ["a b c d", "e f g", "a c e g h b d", "h f"]


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in ids(rows=4)]


def trainer(model: Any, folder: Any, **how: Any) -> Any:
    arguments = transformers.TrainingArguments(folder, **HOW, **how)
    return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())


@pytest.mark.parametrize("with_balance", [False, True], ids=["plain", "balance"])
@pytest.mark.parametrize("kind", ["gpt", "latent"])
def test_evaluation_and_prediction(kind, with_balance, tmp_path):
    model = model_of(kind)
    model.config.output_router_logits = with_balance
    running = trainer(model, tmp_path, per_device_eval_batch_size=4, save_strategy="no")
    batch = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        expected = model(batch, labels=batch)
    assert running.evaluate()["eval_loss"] == pytest.approx(expected.loss.item())
    predicted = running.predict(rows())
    assert_close(torch.tensor(predicted.predictions), expected.logits, 1e-12)
    assert predicted.metrics["test_loss"] == pytest.approx(expected.loss.item())


@pytest.mark.parametrize("kind", ["gpt", pytest.param("shared", marks=pytest.mark.faults)])
def test_the_best_model_is_loaded_at_the_end(kind, tmp_path):
    """The best is defined as that with the higher loss, which is the first."""
    each_step = {
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
    }
    how = {"load_best_model_at_end": True, "greater_is_better": True, "learning_rate": 1e-3}
    running = trainer(model_of(kind), tmp_path, metric_for_best_model="loss", **each_step, **how)
    running.train()
    assert running.state.best_model_checkpoint.endswith("-1")
    assert running.evaluate()["eval_loss"] == pytest.approx(running.state.best_metric)


# ---------------------------------------------------------------------- TRL


def tokenizer() -> Any:
    """Return a tokenizer of a few words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<end>", "<unk>", *WORDS]
    by_word = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    raw = Tokenizer(by_word)
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def sft(model: Any, folder: Any, peft_config: Any = None, **how: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed (extra `peers`)")
    from datasets import Dataset

    settings = {**HOW, "save_strategy": "no", "bf16": False, "max_length": 12, **how}
    return trl.SFTTrainer(
        model,
        trl.SFTConfig(folder, **settings),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("gpt", False),
        ("latent", True),
        ("mixtral", True),
        pytest.param("gpt", True, marks=pytest.mark.faults),
        pytest.param("farskip", False, marks=pytest.mark.faults),
    ],
)
def test_supervised_fine_tuning(kind, packing, tmp_path):
    """Its fused output product gives the model's own loss, packed or padded."""
    model = model_of(kind)
    how = {"router_aux_loss_coef": 0.0, "per_device_train_batch_size": 4, "max_steps": 1}
    running = sft(model, tmp_path, packing=packing, **how)
    batch = next(iter(running.get_train_dataloader()))
    with torch.no_grad():
        fused = model(**batch, use_cache=False, fused_lm_head=True)
        whole = model(**batch, use_cache=False)
        alone = [nats_of(model, running, text) for text in TEXTS]
    assert_close(fused.loss, whole.loss, 1e-6)
    mean = sum(nats for nats, _ in alone) / sum(counted for _, counted in alone)
    assert_close(fused.loss, mean, 1e-6)
    assert running.train().training_loss == pytest.approx(mean.item(), rel=1e-5)


def nats_of(model: Any, running: Any, text: str) -> tuple[torch.Tensor, int]:
    """Return the loss of a text's next tokens, and their number."""
    tokens = torch.tensor([running.processing_class(text + "<end>")["input_ids"]])
    counted = tokens.shape[1] - 1
    return model(tokens, labels=tokens, use_cache=False).loss * counted, counted


@pytest.mark.parametrize("kind", [pytest.param("gpt", marks=pytest.mark.faults), "latent"])
def test_adapters_packing_and_recomputing_together(kind, tmp_path):
    """The load-balance loss reaches the gate's adapters, and nothing else changes."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    model = model_of(kind).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["qkv", "gate", "out"], r=2)
    running = sft(model, tmp_path, adapters, packing=True, learning_rate=0.1)
    running.train()
    assert running.state.log_history[-1]["aux_loss"] > 0.5
    adapted = dict(running.model.named_parameters())
    trained = {name for name, p in adapted.items() if "lora_B" in name and p.any()}
    assert any(".gate." in name for name in trained) and any(".out." in name for name in trained)
    for name, p in model.named_parameters():
        name = name.replace(".base_layer", "")
        assert "lora_" in name or torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    "with_adapters",
    [pytest.param(False, id="whole", marks=pytest.mark.faults), pytest.param(True, id="adapters")],
)
def test_preferences(with_adapters, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed (extra `peers`)")
    peft = pytest.importorskip("peft", reason="peft is not installed (extra `peers`)")
    from datasets import Dataset

    pairs = [{"prompt": "a b", "chosen": " c d", "rejected": " h"} for _ in range(4)]
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    model = model_of("gpt").float()
    model.save_pretrained(tmp_path / "start")  # the reference model is read again
    model.config._name_or_path = str(tmp_path / "start")
    running = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(tmp_path, **HOW, save_strategy="no", bf16=False, learning_rate=0.05),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        peft_config=adapters if with_adapters else None,
    )
    batch = running.data_collator(list(running.train_dataset))
    before = running.compute_loss(running.model, dict(batch)).item()
    running.train()
    assert running.compute_loss(running.model, dict(batch)).item() < before
