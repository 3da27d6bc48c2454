"""An export holds weights that are bit-identical to the checkpoint's, with experts by global id,
for one process."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import scmoe
from scmoe.command_line import call
from scmoe.config.as_yaml import to_yaml
from scmoe.config.load import load_config
from scmoe.inference.offload.migration import offload_experts
from scmoe.moe.layout import Dropless
from scmoe.parallel.checkpoint.durable import newest_good, verify
from scmoe.parallel.checkpoint.export import load_weights
from scmoe.parallel.checkpoint.loading import load_model
from scmoe.runs.trained import load_offloaded, store_experts
from scmoe.training.assembly.model import build_model
from tests.support.commands import train_in_ranks

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    sizes = ("trainer.devices=2", "strategy.ep_size=2", "trainer.max_steps=2")
    done = train_in_ranks(2, "configs/debug.yaml", *sizes, f"runs_dir={runs}")
    assert call("export", str(done.run_dir)) == 0
    return done.run_dir


def model(run_dir, *overrides):
    return build_model(load_config(run_dir / "config.yaml", list(overrides))).eval()


@pytest.mark.inference
@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_experts_offloaded_from_a_checkpoint_or_an_export_give_the_same_logits(
    kind, run_dir, tmp_path
):
    """A store belongs to its weights, wherever they were read; a checkpoint of another step has
    other weights."""
    file, here = run_dir / "export/model.safetensors", ("trainer.devices=1", "strategy.ep_size=1")
    config = load_config(
        run_dir / "config.yaml", (*here, "offload.way=determinate", "offload.slots=3")
    )
    expected, ids = model(run_dir), torch.randint(64, (2, 16))
    load_weights(file, expected)
    source = newest_good(run_dir / "checkpoints") if kind == "checkpoint" else file
    store_experts(config, source, tmp_path / "store")
    for weights in (source, file):
        offloaded, cache = load_offloaded(config, weights, tmp_path / "store")
        with cache, torch.inference_mode():
            assert torch.equal(offloaded(ids).logits_BSV, expected(ids).logits_BSV)
    with pytest.raises(ValueError, match="other weights"):
        offload_experts(model(run_dir, "seed=5"), tmp_path / "store")


def test_experts_are_the_shards_in_the_order_of_the_ranks(run_dir):
    """Read file by file, without torch.distributed: rank 0 holds experts 0 and 1, rank 1 experts 2
    and 3."""
    loaded = model(run_dir)
    load_weights(run_dir / "export/model.safetensors", loaded)
    shards = sorted(newest_good(run_dir / "checkpoints").glob("shard-*"))
    name = "blocks.0.moe.experts.w_in_eDF"
    halves = [load_file(shard)[f"model.model.{name}"] for shard in shards]
    assert [len(half) for half in halves] == [2, 2]
    assert torch.equal(torch.cat(halves), loaded.get_parameter(name))


def test_a_run_of_two_ranks_is_loaded_from_any_form(run_dir):
    """`scmoe.load` takes the run, the file and the folder of Hugging Face's form; transformers is
    not needed."""
    assert sorted(f.name for f in (run_dir / "export").iterdir()) == [
        "config.yaml",
        "model.safetensors",
    ]
    with safe_open(run_dir / "export/model.safetensors", framework="pt") as file:
        assert int(file.metadata()["step"]) == verify(newest_good(run_dir / "checkpoints"))
    assert call("export", str(run_dir), "--format", "hf") == 0
    fresh, expected = model(run_dir), model(run_dir)
    load_model(newest_good(run_dir / "checkpoints"), expected)
    assert any(
        not torch.equal(p, fresh.get_parameter(n)) for n, p in expected.named_parameters()
    ), "nothing was read"
    ids = torch.randint(64, (1, 16))
    outputs = []
    for place in (run_dir, run_dir / "export/model.safetensors", run_dir / "export/hf"):
        loaded = scmoe.load(place)
        assert not loaded.training and isinstance(loaded.blocks[0].moe.rows, Dropless)
        for name, p in expected.named_parameters():
            assert torch.equal(p, loaded.get_parameter(name)), name
        outputs.append(loaded(ids).logits_BSV)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    with pytest.raises(ValueError, match="holds no model"):
        scmoe.load(run_dir / "checkpoints")


def test_an_export_beside_another_models_config_is_refused(run_dir, tmp_path):
    """Its weights have the same names and shapes."""
    (tmp_path / "model.safetensors").symlink_to(run_dir / "export/model.safetensors")
    (tmp_path / "config.yaml").write_text(
        to_yaml(load_config(run_dir / "config.yaml", ["moe.position=pos1"]))
    )
    with pytest.raises(ValueError, match=r"moe\.position is 'pos1', allowed: 'pos2'"):
        scmoe.load(tmp_path / "model.safetensors")


def test_another_model_is_refused_and_its_weights_are_named(run_dir):
    with pytest.raises(ValueError, match=r"holds another model: .*experts"):
        load_weights(run_dir / "export/model.safetensors", model(run_dir, "moe.num_experts=16"))
