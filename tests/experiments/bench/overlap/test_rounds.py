"""Benches refuse impossible options, and the best schedules of the trials of `bench overlap` go
into its rounds."""

import pytest
import torch

from experiments.bench.overlap.rounds import nearest
from experiments.bench.overlap.speedups import name_of_report
from experiments.bench.rank_bench import VariantTimes
from experiments.bench.setting import Setting, pair_setting
from experiments.bench.stacks import Variant, block_config, chosen_by
from scmoe.command_line import call
from scmoe.config.load import load_config
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.schedule.cost import slots
from scmoe.schedule.schedule import Schedule

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.mark.parametrize(
    "words, says",
    [
        ("overlap --device cuda --link-mbit 100", "--link-mbit belongs to links"),
        ("overlap --device cuda --ranks 2", "--ranks is 2, allowed with --device cuda: 1"),
        ("overlap --device cuda --compute emulated", "--compute is emulated"),
        pytest.param("overlap --device cuda", "there is no CUDA device", marks=NO_GPU),
        ("overlap --share 0.52 --link-mbit 100", "--share and --link-mbit"),
        ("overlap --compute real --attention-ms 4", "--attention-ms belongs to emulated compute"),
        ("overlap --heads 4", "--heads belongs to real compute"),
        ("overlap --ffn-dim 64", "--ffn-dim belongs to real compute"),
        ("overlap --accumulate 2", "--accumulate belongs to --level iteration"),
        ("overlap --rows-per-gradient 1", "--rows-per-gradient belongs to --level iteration"),
        (
            "overlap --level iteration --rows-per-gradient 1 --tokens 256",
            "--rows-per-gradient and --tokens",
        ),
        ("overlap --share 1.5", "--share"),
        (
            "overlap --tokens 100 --seq-len 64",
            "--tokens is 100, allowed: multiples of --seq-len (64)",
        ),
        ("overlap --rows top2 top9", "--rows has top9"),
        ("overlap --rows farskip", "--rows has farskip, allowed with --every 2: top2 | "),
        (
            "overlap --every 1 --rows scmoe_pos3",
            "--rows has scmoe_pos3, allowed with --every 1: top2 | ",
        ),
        ("overlap --every 3", "--every"),
        ("overlap --dim 100", "model.dim is 100, allowed: a multiple of"),
        ("overlap --ranks 1", "--ranks is 1"),
        ("overlap --ranks 3", "multiples of --ranks (3)"),
        ("overlap --seq-len 0", "--seq-len"),
        ("overlap --link-mbit 0", "--link-mbit"),
        ("overlap --dtype bfloat16", "--dtype"),
        ("timeline --ranks 3", "--ranks is 3, allowed: divisors of the 8 experts from 2 on"),
        ("timeline --share 1.5", "--share"),
        ("train --ranks 1", "--ranks is 1, allowed: 2 or more"),
        ("inference --ranks 3", "--ranks is 3, allowed: divisors of the 8 experts from 2 on"),
        ("inference --prompt 100", "--prompt is 100, allowed: multiples of 8"),
        (
            "inference --load ragged:1.5",
            "--load is ragged:1.5, but all prompts have the same length.",
        ),
        ("layer --experts 1", "--top-k is 2, allowed: at most --experts (1)"),
        ("layer --dim 12", "--dim is 12, allowed: multiples of 8"),
        ("layer --ffn-dim 100", "--ffn-dim is 100, allowed: multiples of 8"),
        ("inference --tokens 1", "--tokens"),
        ("inference --tokens 8 --load zipf:1", "--tokens and --load exclude each other"),
    ],
)
def test_every_bench_refuses_before_it_measures(words, says, capsys):
    assert call("bench", *words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_a_pair_has_the_heads_of_its_configuration():
    """Three heads do not divide the width, so theirs must be stated."""
    config = load_config(None, ["model.heads=3", "model.dim=64", "model.head_dim=40"])
    setting = pair_setting(config, 0.5, 2, 64)
    model = block_config("top2", setting).model
    assert (model.heads, model.head_dim) == (3, 40)


def test_a_report_of_other_tokens_has_a_name_of_its_own():
    """1,024 tokens are usual in a block, and 3,072 in an iteration."""
    usual = Setting(level="iteration", tokens=3072, rows_per_gradient=3.0)
    fewer = Setting(level="iteration", tokens=1024)
    assert name_of_report(fewer) == f"{name_of_report(usual)}-tokens-1024"
    assert "tokens" not in name_of_report(Setting())


def test_schedules_near_the_best_by_trial_go_into_the_rounds():
    """One disturbed trial, such as the second number of each pair here, excludes no schedule."""
    trials = {0: (1.04, 1.5), 1: (1.00, 1.3), 2: (1.02, 1.02), 3: (1.01, 9.0), 4: (1.029, 1.1)}
    variants = {slot: Variant("pos3", Schedule("scmoe", "pos3", slot)) for slot in trials}
    tried = {variants[slot]: VariantTimes(0.0, pair, 0.0, 0.0) for slot, pair in trials.items()}
    assert nearest([*variants.values()], tried) == [variants[slot] for slot in (1, 3, 2)]
    assert nearest([variants[0], variants[1]], tried) == [variants[1]]


@pytest.mark.parametrize(
    ("block", "preset"),
    [("nvidia", "nvidia_shortcut"), ("nous", "nous"), ("farskip", "instella_moe")],
)
def test_a_row_with_an_moe_in_every_block_is_wired_as_its_preset(block, preset):
    own, published = block_config(block, Setting(every=1)).moe, load_config(f"model/{preset}").moe
    for name in (
        "architecture",
        "every",
        "position",
        "first_position",
        "tap_norm",
        "combine",
        "after_norm",
    ):
        assert getattr(own, name) == getattr(published, name), name


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_planners_choice_runs_in_every_block_as_chosen(chunks):
    """The first block's window is shorter. A choice of one place for both is a variant that is
    tried, so it is not measured twice."""
    first, carried = (slots(Schedule("scmoe", tap, chunks=chunks)) for tap in ("first", "carried"))
    variants = [Variant("nous", schedule) for schedule in carried]
    tried = {variant: variant.block_schedules((first[0], carried[0])) for variant in variants}
    for schedules in ([a, b] for a in first for b in carried):
        layers = tuple(LayerChoice(schedule, {}, ()) for schedule in schedules)
        chosen = chosen_by(ModelChoice(layers), "nous", "balanced")
        assert chosen.block_schedules((first[0], carried[0])) == schedules
        assert (chosen in tried) == (schedules in tried.values())
    assert [schedule.slot for schedule, _ in tried.values()] == [0, 0, 1, 1], (
        "the last slot up to the place"
    )


# -------------------------------------------------- the least time of an iteration


def test_a_report_of_other_sizes_has_a_name_of_its_own():
    settings = [
        Setting(compute="real"),
        Setting(compute="real", dim=1024),
        Setting(compute="real", ffn_dim=1024),
        Setting(compute="real", heads=4),
        Setting(compute="real", num_experts=16),
    ]
    names = [name_of_report(setting) for setting in settings]
    assert len(set(names)) == len(settings)
    assert names[0] == "overlap-real-block-2-ranks-share-0.52"


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "2e6"])
def test_a_capacity_factor_that_no_layer_takes_is_refused(factor, capsys):
    assert call("bench", "layer", f"--capacity={factor}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--capacity" in line
