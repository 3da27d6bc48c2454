"""The bench of the layer goes on without a variant that cannot run."""

import torch
from torch import nn

from experiments.bench.layer import compare


def test_a_variant_that_cannot_run_has_its_error_and_the_others_their_times():
    def x():
        return torch.randn(4, 8, requires_grad=True)

    variants = {
        "small": lambda: (nn.Linear(8, 8), x()),
        "other": lambda: (nn.Linear(8, 8), x()),
        "broken": lambda: (nn.Linear(9, 8), x()),
    }
    found = compare(torch.device("cpu"), variants, {"other": "small", "broken": "small"}, rounds=2)
    assert list(found) == list(variants)
    assert (
        found["other"]["over"] == "small"
        and found["other"]["train_ratio"] > 0 < found["small"]["forward_ms"]
    )
    assert "shapes cannot be multiplied" in found["broken"]["error"]
