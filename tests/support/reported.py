"""Inputs of a report, small and made up: a run's folder, a table, speed-ups, advice."""

import json
from base64 import b64decode
from functools import cache
from pathlib import Path
from typing import Any

from scmoe.config.as_yaml import to_yaml
from scmoe.config.load import load_config

HOST = "trainer-17"
KEY = "wandb_v1_" + "A" * 40
STEPS = (9, 19, 29)
DOT = b64decode(  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@cache
def config_text() -> str:
    return to_yaml(load_config("quickstart", ["trainer.max_steps=30"]))


def write_run(folder: Path, name: str = "quickstart", stamp: str = "20261129-101500") -> Path:
    """Write a run of 30 steps that has everything a report shows."""
    run = folder / name / f"{stamp}-lr-1e-3"
    (run / "analysis").mkdir(parents=True)
    (run / "config.yaml").write_text(config_text(), encoding="utf-8")
    (run / "overrides.txt").write_text("optim.lr=1e-3\n", encoding="utf-8")
    environment = {
        "command": f"scmoe train quickstart 'logger.notes={KEY} on {HOST}.cluster.org'",
        "python": "3.11.7",
        "platform": "Linux",
        "cpus": 2,
        "packages": {"torch": "2.13.0"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_diff": "",
    }
    state = {"state": "finished", "pid": 1, "started": None, "host": HOST, "machine": "ab"}
    summary = {"val_loss": 6.25, "tokens_per_s": 2048.0, "params_total": 7338240}
    write_json(run / "env.json", environment)
    write_json(run / "state.json", state)
    write_json(run / "summary.json", summary)
    losses = [f"{step},{7.0 - step / 30:.3f},,2048" for step in STEPS]
    rows = ["step,train/loss,val/loss,time/tokens_per_s", *losses, "29,,6.25,"]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (run / "analysis" / "expert_load.png").write_bytes(DOT)
    return run


def table() -> dict[str, Any]:
    """Return results.json of a table with a baseline and one other row."""
    ours = {"mean": 3.7, "std": 0.01, "n": 2, "median": 3.7, "range": [3.69, 3.71]}
    minus = {"mean": -0.02, "low": -0.05, "high": 0.01, "p": 0.4, "n": 2}
    row = {"groups": ["all"], "ours": ours, "others": {}}
    baseline = {"name": "top-2", "paper": {"val_loss": 3.27}, "minus_baseline": None}
    scmoe = {
        "name": "ScMoE Pos-2",
        "paper": {"val_loss": 3.2248, "difference": -0.0456},
        "minus_baseline": minus,
    }
    return {
        "table": "table3",
        "title": "Table 3: validation loss",
        "scale": "small",
        "metric": "val_loss",
        "unit": "nats per token",
        "metrics": {"val_loss": {"unit": "nats per token", "better": "lower"}},
        "model": "4 layers",
        "command": "make table",
        "rows": [row | baseline, row | scmoe],
    }


def speeds() -> dict[str, Any]:
    """Return a report of `bench overlap` with the paper's values."""
    row = {"train_ms": 10.0, "train_speedup": 1.7, "train_quartiles": [1.6, 1.8]}
    row |= {"forward_ms": 4.0, "forward_speedup": 2.0, "forward_quartiles": [1.9, 2.1]}
    return {
        "level": "iteration",
        "comm_share": 0.53,
        "rounds": 9,
        "paper": {"scmoe_pos2": {"train": 1.43, "forward": 1.66}},
        "paper_source": "paper, Table 1",
        "rows": {"scmoe_pos2": row},
    }


def advice() -> dict[str, Any]:
    """Return what `scmoe advise` prints for a model whose standard is top-8."""
    row = {
        "step_ms": 640.0,
        "interval": [600.0, 680.0],
        "over_top2": 1.27,
        "over_shared": 1.02,
        "over_best": 1.06,
        "over_best_interval": [0.97, 1.13],
        "answer": "within the error",
        "why": "1,300 tokens a rank are missing",
        "memory_gib": 71.5,
        "other_ms": 20.0,
        "fits": True,
    }
    too_large = row | {"answer": "pays", "memory_gib": 114.1, "fits": False}
    job = {
        "config": "qwen3_moe",
        "cluster": "8x8xH100-InfiniBand",
        "ranks": 64,
        "ep": 32,
        "tokens": 16384,
        "batches": 1,
        "load": "hot_rank:1.7",
        "standard": "top8",
        "share": 0.24,
    }
    return {"rows": {"scmoe_pos2": row, "scmoe_pos1_two": too_large}, "job": job}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
