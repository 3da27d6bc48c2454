"""Every configuration builds without memory; what does not fit its tokenizer, its nodes or its text
is said."""

from pathlib import Path

import pytest

from scmoe.config.as_yaml import to_yaml
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config, load_text
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.models.model_cost import count_parameters, total_and_active
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.run.train import doubts

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("cluster", "sweep") and path.name != "table.yaml"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_builds(path):
    """A config that is saved with changes and loaded again stays equal."""
    assert path.read_text(encoding="utf-8").startswith("# ")
    config = load_config(path, ["logger.tags=[a,'1',null]", "seed=7"])
    assert load_text(to_yaml(config), "saved") == config
    counts = count_parameters(build_model_on_meta(config))
    total, active = total_and_active(counts)
    assert 0 < active <= total and "other" not in counts


@pytest.mark.parametrize("words", ["", "trainer.devices=2 moe.architecture=dense"])
def test_one_batch_in_flight_is_allowed_where_no_rows_travel(words):
    load_config(None, ["schedule.batches_in_flight=1", *words.split()])


@pytest.mark.parametrize("data", ["openwebtext", "slimpajama", "wikitext103"])
@pytest.mark.parametrize(
    ("model", "tokens"), [("gpt2_moe_small", ("gpt2", 50257)), ("llama2_moe", ("bpe", 32000))]
)
def test_a_models_tokenizer_does_not_depend_on_the_data_set(model, tokens, data, tmp_path):
    """LLaMA2-MoE keeps a vocabulary of LLaMA-2's size; GPT-2's tokenizer would require a larger
    one."""
    parts = [CONFIGS / f"model/{model}.yaml", CONFIGS / f"data/{data}.yaml"]
    for order in (parts, parts[::-1]):
        (tmp_path / "mine.yaml").write_text(f"extends: [{', '.join(map(str, order))}]")
        found = load_config(tmp_path / "mine.yaml").data
        assert (found.name, found.tokenizer, found.vocab_size) == ("hf", *tokens)


def test_the_error_for_a_too_small_vocabulary_names_both_keys(tmp_path):
    llama, model = CONFIGS / "model/llama2_moe.yaml", CONFIGS / "model/llama2_moe_tiny.yaml"
    with pytest.raises(ConfigError, match="vocab_size is 32000, allowed: 50257 or more"):
        load_config(llama, ["data.tokenizer=gpt2"])
    file = tmp_path / "tokenizer.json"
    make_tokenizer(
        "bpe", 600, ["a text of some words, " * 100 + "".join(map(chr, range(0x400, 0x600)))]
    ).save(file)
    config = load_config(model, ["data.name=text", "data.path=.", f"data.tokenizer={file}"])
    with pytest.raises(ConfigError, match=r"vocab_size is 512, allowed: .*tokenizer=.*json"):
        build_datamodule(config)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'none\.json'; allowed: bpe"):
        build_datamodule(load_config(model, ["data.tokenizer=none.json"]))


def test_what_a_user_has_hardly_meant_is_said(tmp_path):
    """A warm-up that does not end, and more ids than a tokenizer of this text can have. The text
    repeats a line."""
    (tmp_path / "a.txt").write_text(
        "It was a bright cold day, and the clocks were striking.\n" * 400
    )
    words = [
        "data.name=text",
        f"data.path={tmp_path}",
        f"data.cache_dir={tmp_path}/cache",
        "trainer.max_steps=9",
    ]
    found = []
    for vocabulary, warmup in ((257, 9), (4096, 10)):
        config = load_config(
            None,
            [
                *words,
                f"data.vocab_size={vocabulary}",
                f"optim.warmup_steps={warmup}",
                "data.seq_len=8",
            ],
        )
        prepare_data(data := build_datamodule(config))
        found.append([text.partition(" is ")[0] for text in doubts(config, data)])
    assert found == [[], ["optim.warmup_steps", "data.vocab_size"]]
