"""Load what `make export` wrote, without Lightning, and predict the next token. Without a file: the
newest run's.

.venv/bin/python docs/examples/load_export.py exported/model.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from scmoe.config.load import load_config
from scmoe.parallel.checkpoint.export import load_weights
from scmoe.training.assembly.model import build_model


def load_export(file: Path) -> Any:
    """Return the model of an export. One process is enough."""
    model = build_model(load_config(file.parent / "config.yaml"))
    load_weights(file, model)
    return model.eval()


def main() -> None:
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/latest/export/model.safetensors")
    if not file.exists():
        sys.exit(f"{file} does not exist. Write it with: make export")
    model = load_export(file)
    ids = torch.zeros(1, 8, dtype=torch.int64)  # eight end-of-text tokens
    with torch.inference_mode():
        probabilities = model(ids).logits_BSV[0, -1].softmax(-1)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    print(
        f"likeliest next token: {probabilities.argmax().item()}, probability"
        f" {probabilities.max().item():.3f}"
    )


if __name__ == "__main__":
    main()
