"""`bench overlap` refuses impossible options, and the best schedules of its trial go into the rounds."""

from __future__ import annotations

import re

import pytest
import torch

from scmoe.experiments.bench.__main__ import overlap
from scmoe.experiments.bench.overlap import Seconds, Variant, nearest, through_link
from scmoe.experiments.bench.overlap_report import DEFAULTS
from scmoe.experiments.engine.command_line import call
from scmoe.schedule.schedule import Schedule


@pytest.mark.parametrize(
    "options, message",
    [
        ("--device cuda --link-mbit 100", "--link-mbit belongs to links, and one GPU has none"),
        ("--device cuda --ranks 2", "--ranks is 2, allowed with --device cuda: 1"),
        ("--device cuda --compute emulated", "--compute is emulated, allowed with --device cuda: real"),
        ("--share 0.5 --link-mbit 100", "--share and --link-mbit exclude each other"),
        ("--compute real --attention-ms 4", "--attention-ms belongs to emulated compute, and --compute is real"),
        ("--heads 4", "--heads belongs to real compute, and --compute is emulated"),
        ("--reductions ddp", "--reductions belongs to --level iteration, and --level is block"),
        ("--share 1.5", "--share is 1.5, allowed: above 0 and below 1"),
        ("--tokens 100 --seq-len 64", "--tokens is 100, allowed: multiples of --seq-len (64)"),
        ("--rows top9", "--rows has top9, allowed: top2 | "),
        ("--nodes 2", "--nodes is 2, allowed: 2 or more, with equally many of the 2 ranks on each, 2 or more"),
        ("--nodes 3 --ranks 4", "--nodes is 3, allowed: 2 or more"),
        ("--exchange hierarchical", "--exchange is hierarchical, allowed with --nodes 1: flat"),
        ("--ranks 1", "--ranks is 1, allowed: 2 or more, as one rank sends nothing"),
        ("--ranks 3", "--num-experts is 8, allowed: multiples of --ranks (3)"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_one_line(options, message, capsys):
    assert call("bench", "overlap", *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "command, message",
    [
        ("overlap --seq-len 0", "--seq-len"),
        ("overlap --link-mbit 0", "--link-mbit"),
        ("growth --of tokens --points 1000", "--points has 1000: --tokens is 1000, allowed: multiples of --seq-len"),
        ("growth --of ranks --points 2 6", "--points has 6: --num-experts is 8, allowed: multiples of --ranks (6)"),
        ("growth --of ranks --points 1", "--points has 1, allowed: 2 or more"),
        ("timeline --ranks 3", "--ranks is 3, allowed: divisors of the 8 experts from 2 on"),
        ("timeline --share 1.5", "--share"),
        ("exchange --between-mbit 0", "--between-mbit"),
        ("dense --ranks 3", "--ranks is 3, allowed: multiples of 2 nodes and of --ep-size (2)"),
        ("dense --rounds 0", "--rounds"),
        ("generation --tokens 1", "--tokens is 1, allowed: 2 or more"),
    ],
)
def test_every_bench_refuses_before_it_measures(command, message, capsys):
    assert call("bench", *command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_rows_of_a_node_s_ranks_share_its_card():
    assert [through_link(*at) for at in ((2, 1), (4, 1), (4, 2), (8, 2))] == [0.5, 0.75, 1.0, 2.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(capsys):
    assert call("bench", "overlap", "--device", "cuda") == 2
    assert capsys.readouterr().err == "error: --device is cuda, and there is no CUDA device here\n"


def test_the_help_shows_the_defaults_of_the_measurement():
    sizes = {name: float(size) for name, size in re.findall(r"(\w+): \(default: ([\d.]+)\)\n", overlap.__doc__)}
    assert len(sizes) == 8 and sizes == {name: DEFAULTS[name] for name in sizes}


def test_schedules_near_the_best_by_trial_go_into_the_rounds():
    """One disturbed trial, such as the second number of each pair here, excludes no schedule."""
    trials = {0: (1.04, 1.5), 1: (1.00, 1.3), 2: (1.02, 1.02), 3: (1.01, 9.0), 4: (1.029, 1.1)}
    tried = {
        Variant("pos3", Schedule("scmoe", "pos3", slot)): Seconds(0.0, pair, 0.0, 0.0, 0.0)
        for slot, pair in trials.items()
    }
    assert [v.schedule.slot for v in nearest(list(tried), tried)] == [1, 3, 2]
    two = list(tried)[:2]
    assert nearest(two, tried) == two[1:]
