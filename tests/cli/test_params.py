"""`make params` gives the paper's totals, and the output of `make estimate` is JSON for other
programs."""

import json
import sys
from pathlib import Path

import pytest

from scmoe.cli import params as parameters
from scmoe.command_line import call
from scmoe.config.load import load_config
from scmoe.training.assembly.model import build_model

XL = "configs/model/gpt3_moe_xl.yaml"


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_totals_of_the_shortcut_family_are_the_published_ones(capsys):
    """LongCat-Flash: 560B, of which 18.6B to 31.3B are active without embeddings, by a token's zero
    experts."""
    names = ("longcat_flash", "instella_moe", "nvidia_shortcut", "nous")
    assert call("params", *names) == 0
    counts = last_line(capsys)
    assert {name: list(rows) for name, rows in counts.items()} == {
        name: ["farskip" if name == "instella_moe" else "scmoe"] for name in names
    }
    longcat, instella = counts["longcat_flash"]["scmoe"], counts["instella_moe"]["farskip"]
    assert instella["total"] == 15_862_789_248 and round(instella["active"] / 1e9, 1) == 2.8
    expert, embedding = 28 * 3 * 6144 * 2048, 131072 * 6144
    least = longcat["total"] - 512 * expert - embedding
    assert longcat["total"] // 10**9 == 560
    assert (least // 10**8, (least + 12 * expert) // 10**8) == (186, 313)
    assert longcat["active"] == least + embedding + 8 * expert, "the mean is 12 x 512 / 768 experts"
    tap_norms = 26 * 2048  # that the two others have beside Instella's weights
    assert counts["nous"]["scmoe"]["total"] == instella["total"] + tap_norms
    assert counts["nvidia_shortcut"]["scmoe"]["total"] == instella["total"] + 2 * tap_norms


def test_dgmoe_share_differs_from_the_paper_by_one_expert_per_shared_pair():
    """The paper has 157M without sharing. Its 124M fits if each of four second pairs keeps one
    expert (docs/decisions/0016-parameter-counts.md)."""
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = (parameters.COUNTED_ARCHITECTURES[name] for name in ("dgmoe_share", "dgmoe"))
    ours, without = (parameters.count("swinv2_moe_s", each)["total"] for each in words)
    expert, gate = 2 * 384 * 1536, 384 * 8
    assert without - ours == 4 * (8 * expert + gate)
    assert (round(without / 1e6), round((ours + 4 * expert) / 1e6)) == (157, 124)


def test_params_prints_json_for_the_given_preset(capsys):
    assert {path.stem for path in Path("configs/model").glob("*.yaml")} >= {
        preset for preset, _ in parameters.PUBLISHED
    }
    assert call("params", "gpt2_moe_small_tiny") == 0
    counts = last_line(capsys)
    assert counts.keys() == {"gpt2_moe_small_tiny"}
    assert counts["gpt2_moe_small_tiny"].keys() == parameters.COUNTED_ARCHITECTURES.keys()
    model = build_model(
        load_config(parameters.PRESETS / "gpt2_moe_small_tiny.yaml", ["moe.noisy=false"])
    )
    total = sum(p.numel() for p in model.parameters())
    # only experts have stacked weights
    idle = sum(p.numel() for p in model.parameters() if p.dim() == 3) * 7 // 8
    assert counts["gpt2_moe_small_tiny"]["scmoe"] == {"total": total, "active": total - idle}


@pytest.mark.parametrize("words", (("estimate", "debug"), ("params", "gpt2_moe_small")))
def test_a_person_at_a_terminal_sees_no_json(words, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert call(*words) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err != ""


def test_an_estimate_equals_a_calculation_by_hand(capsys):
    assert (
        call(
            "estimate",
            XL,
            "ep=8",
            "dp=2",
            "trainer.precision=bf16-mixed",
            "data.global_batch_size=64",
        )
        == 0
    )
    facts = last_line(capsys)
    total, experts = facts["params_total"], 12 * 8 * 2 * 2048 * 8192
    assert facts["params_per_rank"] == total - experts + experts // 8
    assert facts["all_to_all_bytes_per_token_and_transfer"] == [2.0 * 2048 * 2] * 12, (
        "capacity factor, D, bf16"
    )
    assert facts["all_to_all_bytes_training"] == 4 * 12 * 2 * 2048 * 2
    assert facts["all_to_all_share_that_travels"] == 7 / 8
    assert facts["samples_per_rank"] == 64 // 16
    memory = facts["memory_bytes"]
    assert memory["weights"] == 4 * facts["params_per_rank"]
    assert memory["gradients"] == memory["weights"]
    # The usual estimate is 6 N + 12 L S D (attention). N is the weights in products; experts get
    # two rows per token.
    used = facts["params_active"] + experts // 8 - 2048 * 2048
    assert facts["flops_training"] == pytest.approx(6 * used + 12 * 24 * 2048 * 2048, rel=1e-2)


@pytest.mark.parametrize(
    "arguments, degrees",
    [
        (["configs/quickstart.yaml"], (2, 1)),
        (["configs/experiment/gpt2_moe_small.yaml"], (8, 1)),
        (["configs/experiment/gpt2_moe_small.yaml", "dp=4"], (8, 4)),
        (["configs/quickstart.yaml", "ep=4"], (4, 1)),
        (["configs/quickstart.yaml", "trainer.num_nodes=2"], (2, 2)),
        (["configs/quickstart.yaml", "strategy.ep_size=1"], (1, 2)),
        (["configs/quickstart.yaml", "trainer.devices=8", "strategy.ep_size=null"], (8, 1)),
        ([XL], (1, 1)),
    ],
)
def test_an_estimate_uses_the_configs_ranks_unless_others_are_given(arguments, degrees, capsys):
    assert call("estimate", *arguments) == 0
    facts = last_line(capsys)
    assert (facts["ep_size"], facts["dp_size"]) == degrees


def test_recomputing_costs_flops_and_saves_memory(capsys):
    def facts(recompute: bool) -> dict:
        assert call("estimate", XL, "ep=8", f"trainer.recompute={recompute}") == 0
        return last_line(capsys)

    kept, recomputed = facts(False), facts(True)
    assert kept["flops_training"] < recomputed["flops_training"] < 4 / 3 * kept["flops_training"]
    assert recomputed["memory_bytes"]["activations"] < 0.5 * kept["memory_bytes"]["activations"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "parameter CONFIG requires an argument"),
        (["ep=2"], "ep=2: cannot be read"),
        ([XL, "ep=0"], "ep is 0. Give a number"),
        ([XL, "dp=two"], "dp is 'two'"),
        ([XL, "ep=3"], "strategy.ep_size is 3, allowed: a divisor of moe.num_experts, 8"),
        ([XL, "ep=8", "model.depth=3"], "unknown key 'model.depth'"),
        ([XL, "ep=4", "strategy.ep_size=8"], "strategy.ep_size and ep or dp"),
        (
            ["configs/model/llama2_moe.yaml", "ep=16"],
            "strategy.ep_size is 16, allowed: a divisor of",
        ),
        ([XL, "moe.architecture=dense", "ep=2"], "strategy.ep_size is 2, allowed: 1 or null"),
    ],
)
def test_wrong_arguments_give_one_error_line(arguments, message, capsys):
    assert call("estimate", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
