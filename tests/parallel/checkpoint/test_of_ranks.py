"""What a rank reads of entries that differ between the ranks that saved them."""

import torch

from scmoe.parallel.checkpoint.of_ranks import OF_RANKS, rank_meta
from scmoe.parallel.mesh import Mesh


def test_in_another_layout_numbers_are_rank_0s_and_tensors_are_left_out_with_a_reason():
    averages, seconds, mine = ("callbacks", "Averages"), ("callbacks", "Timed"), ("mine",)
    saved = {
        "callbacks": {"Averages": torch.zeros(4), "Timed": 10},
        "mine": torch.zeros(4),
        "equal": 1,
        OF_RANKS: {
            "layout": [2, 2, 0],
            "keys": [averages, seconds, mine],
            "ranks": [{1: torch.ones(4)}, {1: 11}, {1: torch.ones(4)}],
        },
    }
    read, reasons = rank_meta(saved, Mesh())
    assert read == {"callbacks": {"Timed": 10}, "equal": 1}
    assert reasons.keys() == {averages, mine}
    assert "callback Averages" in reasons[averages] and "2 ranks" in reasons[mine]
