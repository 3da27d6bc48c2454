"""The LightningModule gives the optimizer the right groups of parameters."""

from __future__ import annotations

from scmoe.config.load import load
from scmoe.training.build.model import build_module


def test_matrices_decay_and_nothing_else():
    """Norms, biases and position embeddings do not decay; the tied token embedding is a matrix and does."""
    config = load(None, ["model.layers=2", "model.dim=16", "model.heads=2", "moe.num_experts=4", "data.seq_len=8"])
    module = build_module(config)
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in module.model.named_parameters():
        is_matrix = p.dim() > 1 and not name.startswith("positions")
        assert decay[p] == (config.optim.weight_decay if is_matrix else 0.0), name
