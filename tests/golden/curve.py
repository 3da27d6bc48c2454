"""The golden loss curve: the losses of a short training on real text are stored beside this file.

`python -m tests.golden.curve` trains and stores them again. Do that only after a change that is
meant to change losses, and say in the commit why they change.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.support.commands import rows_of, train_in_ranks

STORED = Path(__file__).with_name("curve.json")
RUN = (  # the quickstart's text and tokenizer, so that its prepared data is used again
    *(
        "configs/quickstart.yaml",
        "model.dim=64",
        "model.heads=2",
        "data.seq_len=64",
        "data.val_sequences=16",
    ),
    *("trainer.devices=1", "strategy.ep_size=1", "trainer.threads=1", "trainer.precision=64-true"),
    *(
        "trainer.max_steps=20",
        "trainer.val_every=10",
        "trainer.log_every=1",
        "trainer.checkpoint_every=20",
    ),
    *("optim.warmup_steps=5", "trainer.progress=false", "logger.mode=disabled"),
)
METRICS = ("train/loss", "val/loss")


def train(folder: Path, *changes: str, ranks: int = 1) -> dict[str, list[float]]:
    """Return the losses of all steps and validations. changes: further overrides."""
    done = train_in_ranks(ranks, *RUN, f"runs_dir={folder}", *changes)
    rows = rows_of(done.run_dir / "metrics.csv")
    return {name: [float(row[name]) for row in rows if name in row] for name in METRICS}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        STORED.write_text(json.dumps(train(Path(folder)), indent=1) + "\n")
