"""Write text with a run's model: `python -m experiments.sample RUN_DIR [--prompt TEXT] [--tokens N] ...`.

One process, whatever number of ranks the run had: the checkpoint is read whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scmoe.config.fields import ConfigError


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sample", description="Write text with the newest checkpoint of a run.")
    parser.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    parser.add_argument("--prompt", default="", help="text to go on from (default: the start of a document)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write (default: 100)")
    parser.add_argument("--number", type=int, default=3, help="how many texts (default: 3)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among so many tokens (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    options = parser.parse_args(arguments)
    try:
        texts = sample(options)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for text in texts:
        print(f"{text}\n---")
    return 0


def sample(options: argparse.Namespace) -> list[str]:
    import torch

    from datamodules.text import TextDataModule
    from scmoe.config.load import load
    from scmoe.models.decoder import generate
    from scmoe.parallel.checkpoint.durable import newest_good
    from scmoe.parallel.checkpoint.loading import load_model
    from scmoe.parallel.mesh import ParallelContext
    from scmoe.training.build.data import build_datamodule
    from scmoe.training.build.model import build_model

    run_dir = options.run.resolve()
    config = load(run_dir / "config.yaml")
    data = build_datamodule(config)
    if not isinstance(data, TextDataModule):
        raise ConfigError(f"{options.run} was trained on {config.data.name} data, which is no text")
    data.prepare_data()
    data.setup()
    model = build_model(config, ParallelContext()).eval()
    load_model(newest_good(run_dir / "checkpoints"), model, prefix="model.")
    start = [data.end_of_text, *data.encode(options.prompt).tolist()]
    ids = torch.tensor([start] * options.number)
    with torch.inference_mode():
        written = generate(
            model, ids, options.tokens, temperature=options.temperature, top_k=options.top_k, seed=options.seed
        )
    return [data.decode(row[1:].tolist()) for row in written]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
