import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Literal

from scmoe.command_line import call
from scmoe.config.leaves import ConfigError

OLDEST_TORCH = (2, 10)


def main(
    *,
    out: Path | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    tiny: bool = False,
    parts: list[str] | None = None,
) -> int:
    """Check scmoe on one GPU, in nine minutes at most: tests, speed of the layer, overlap,
    GPT2-MoE-Small, a short training.

    Each part runs in its own process with its own clock. The folder gets report.md, results.json,
    pictures and traces, at most 8 files. Standard output is JSON with the state of each part; the
    exit code is 0 if all are ok.

    Args:
        out: a new or empty folder (default: runs/gpu-check/ and the time)
        device: cpu: a trial, with --tiny
        tiny: tiny sizes: shows that the check runs, and no speed
        parts: run these parts only
    """
    import torch

    from experiments.bench.gpu.check import CHECK_PARTS, write_report
    from experiments.engine.isolated import Place, run_parts

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ConfigError(f"torch is {torch.__version__}. Install 2.10 or later")
    if device == "cpu" and not tiny:
        raise ConfigError("--device is cpu, where the sizes of a card take hours. Add --tiny")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and there is no CUDA device here")
    names = parts or list(CHECK_PARTS)
    if unknown := [name for name in names if name not in CHECK_PARTS]:
        raise ConfigError(f"--parts has {unknown[0]}, allowed: {' | '.join(CHECK_PARTS)}")
    out = out or Path("runs/gpu-check", datetime.now().strftime("%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"--out is {str(out)!r}, which is not empty. Give a new or empty folder")
    setup = Place(device, tiny, out)
    results = run_parts({name: CHECK_PARTS[name] for name in names}, setup)
    write_report(setup, results)
    states = {name: part["state"] for name, part in results.items()}
    print(
        json.dumps({"out": str(out), "device": setup.device, "tiny": setup.tiny, "parts": states})
    )
    return 0 if set(states.values()) == {"ok"} else 1


if __name__ == "__main__":
    sys.exit(call("gpu-check", *sys.argv[1:]))
