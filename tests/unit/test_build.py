"""Every configuration builds without memory, and the sizes of models equal the paper's."""

import pickle
from pathlib import Path

import pytest

from scmoe.config.leaves import ConfigError
from scmoe.config.load import load, load_text, to_yaml
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.parallel.mesh import ParallelContext
from scmoe.runs.on_ranks import config_without_training
from scmoe.training.assembly.data import build_datamodule, prepare_data
from scmoe.training.assembly.model import build_model, build_model_on_meta, build_module
from scmoe.training.run.printout import count_parameters, total_and_active
from scmoe.training.run.train import doubts

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("cluster", "sweep") and path.name != "table.yaml"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_config_builds(path):
    """A config that is saved with changes and loaded again stays equal."""
    assert path.read_text(encoding="utf-8").startswith("# ")
    config = load(path, ["logger.tags=[a,'1',null]", "seed=7"])
    assert load_text(to_yaml(config), "saved") == config
    total, active = total_and_active(count_parameters(build_model_on_meta(config)))
    assert 0 < active <= total


@pytest.mark.parametrize("own", ("strategy.dense=hybrid", "strategy.ep_size=4 strategy.exchange=hierarchical"))
def test_a_run_on_nodes_is_used_in_one_process(own):
    nodes = ("trainer.devices=2", "trainer.num_nodes=2", "data.global_batch_size=8", *own.split())
    config = config_without_training(lambda words: load(None, [*nodes, *words]), Path("weights"), ())
    assert (config.trainer.devices, config.trainer.num_nodes, config.strategy.ep_size) == (1, 1, None)


def test_every_parameter_is_counted_once():
    model = build_model_on_meta(load(None, ["moe.noisy=true"]))
    total, active = total_and_active(count_parameters(model))
    assert total == sum(p.numel() for p in model.parameters())
    experts = count_parameters(model)["experts"][1]
    assert active == total - experts + experts // 8, "a token uses one of 8 experts"
    assert "other" not in count_parameters(model)


@pytest.mark.parametrize("architecture", ("top_k", "shared_expert", "scmoe"))
def test_each_rank_holds_a_share_of_the_experts_and_counts_all_of_them(architecture):
    words = ["model.dim=32", "data.vocab_size=300", "trainer.devices=2", "strategy.ep_size=2"]
    config = load(None, [*words, f"moe.architecture={architecture}"])
    whole = count_parameters(build_model(config, ParallelContext()))

    class TwoRanks(ParallelContext):
        def dispatcher(self, num_experts, ceiling=None, buffered=False):
            return ParallelContext().dispatcher(num_experts)

    shares = [build_model(config, TwoRanks(rank=rank, world_size=2, ep_size=2)) for rank in (0, 1)]
    assert all(count_parameters(share) == whole for share in shares)
    ids = [module.expert_ids for share in shares for module in share.modules() if hasattr(module, "expert_ids")]
    assert set(ids) == {range(0, 4), range(4, 8)}


@pytest.mark.parametrize("data", ["openwebtext", "slimpajama", "wikitext103"])
@pytest.mark.parametrize(("model", "tokens"), [("gpt2_moe_small", ("gpt2", 50257)), ("llama2_moe", ("bpe", 32000))])
def test_a_models_tokenizer_does_not_depend_on_the_data_set(model, tokens, data, tmp_path):
    """LLaMA2-MoE keeps a vocabulary of LLaMA-2's size; GPT-2's tokenizer would require a larger one."""
    parts = [CONFIGS / f"model/{model}.yaml", CONFIGS / f"data/{data}.yaml"]
    for order in (parts, parts[::-1]):
        (tmp_path / "mine.yaml").write_text(f"extends: [{', '.join(map(str, order))}]")
        found = load(tmp_path / "mine.yaml").data
        assert (found.name, found.tokenizer, found.vocab_size) == ("hf", *tokens)


def test_the_error_for_a_too_small_vocabulary_names_both_keys(tmp_path):
    llama, model = CONFIGS / "model/llama2_moe.yaml", CONFIGS / "model/llama2_moe_tiny.yaml"
    with pytest.raises(ConfigError, match=r"vocab_size is 32000, allowed: 50257 or more for data\.tokenizer=gpt2"):
        load(llama, ["data.tokenizer=gpt2"])
    file = tmp_path / "tokenizer.json"
    make_tokenizer("bpe", 600, ["a text of some words, " * 100 + "".join(map(chr, range(0x400, 0x600)))]).save(file)
    config = load(model, ["data.name=text", "data.path=.", f"data.tokenizer={file}"])
    with pytest.raises(ConfigError, match=r"vocab_size is 512, allowed: \d+ or more, .* data\.tokenizer=.*json"):
        build_datamodule(config)
    with pytest.raises(ConfigError, match=r"data\.tokenizer is 'none\.json'; allowed: bpe, gpt2, or the path"):
        build_datamodule(load(model, ["data.tokenizer=none.json"]))


def test_a_module_can_be_sent_to_a_spawned_process():
    """The module is sent without weights: `configure_model` makes them in each rank."""
    config = load(CONFIGS / "debug.yaml")
    module = pickle.loads(pickle.dumps(build_module(config)))
    module.configure_model()
    total, _ = total_and_active(count_parameters(build_model_on_meta(config)))
    assert sum(p.numel() for p in module.parameters()) == total


def test_what_a_user_has_hardly_meant_is_said(tmp_path):
    """A warm-up that does not end, and more ids than a tokenizer of this text can have. The text repeats a line."""
    (tmp_path / "a.txt").write_text("It was a bright cold day, and the clocks were striking.\n" * 400)
    words = ["data.name=text", f"data.path={tmp_path}", f"data.cache_dir={tmp_path}/cache", "trainer.max_steps=9"]
    found = []
    for vocabulary, warmup in ((257, 9), (4096, 10)):
        config = load(None, [*words, f"data.vocab_size={vocabulary}", f"optim.warmup_steps={warmup}", "data.seq_len=8"])
        prepare_data(data := build_datamodule(config))
        found.append([text.partition(" is ")[0] for text in doubts(config, data)])
    assert found == [[], ["optim.warmup_steps", "data.vocab_size"]]
