"""Whole weights of a run's newest checkpoint: `python -m experiments.export RUN_DIR [--out FILE]`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="export", description="Write the newest checkpoint's weights as one file.")
    parser.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    parser.add_argument("--out", type=Path, help="default: RUN/export/model.safetensors; config.yaml goes beside it")
    options = parser.parse_args(arguments)
    from scmoe.config.load import load
    from scmoe.parallel.checkpoint.durable import newest_good
    from scmoe.parallel.checkpoint.export import consolidate
    from scmoe.training.init_from.settings import model_settings

    run_dir = options.run.resolve()
    out = options.out or run_dir / "export" / "model.safetensors"
    try:
        settings = model_settings(load(run_dir / "config.yaml"))
        checkpoint = newest_good(run_dir / "checkpoints")
        out.parent.mkdir(parents=True, exist_ok=True)
        consolidate(checkpoint, out, settings)
        config = out.parent / "config.yaml"
        if config.resolve() != run_dir / "config.yaml":
            shutil.copyfile(run_dir / "config.yaml", config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}, from {checkpoint.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
