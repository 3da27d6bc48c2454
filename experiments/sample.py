"""Write text with the last or best checkpoint of a run: one process, whatever number of ranks the run had."""

import sys
from argparse import Namespace
from pathlib import Path

from experiments import command, parser
from scmoe.config.fields import ConfigError


def sample(options: Namespace) -> list[str]:
    """Return the texts. Raises ConfigError for a run on other data than text."""
    import torch

    from datamodules.text import TextDataModule
    from scmoe.models.decoder import generate
    from scmoe.parallel.checkpoint.loading import load_model
    from scmoe.parallel.mesh import ParallelContext
    from scmoe.training.build.data import build_datamodule
    from scmoe.training.build.model import build_model
    from scmoe.training.run.resume import config_of, find_checkpoint

    run_dir, how = options.run.resolve(), {key: getattr(options, key) for key in ("temperature", "top_k", "seed")}
    checkpoint = find_checkpoint(run_dir, options.which)
    config = config_of(run_dir, checkpoint)
    data = build_datamodule(config)
    if not isinstance(data, TextDataModule):
        raise ConfigError(f"{options.run} was trained on {config.data.name} data, allowed: a run on text")
    data.prepare_data()
    data.setup()
    model = build_model(config, ParallelContext()).eval()
    load_model(checkpoint, model, prefix="model.")
    print(f"from the {options.which} checkpoint, {checkpoint.name}", file=sys.stderr)
    start = [data.tokenizer.end_of_text, *data.tokenizer.encode(options.prompt).tolist()]
    with torch.inference_mode():
        written = generate(model, torch.tensor([start] * options.number), options.tokens, **how)
    return [data.tokenizer.decode(row[1:].tolist()) for row in written]


@command
def main(arguments: list[str]) -> None:
    options = parser("sample", __doc__)
    options.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    options.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint (default: last)")
    options.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    options.add_argument("--tokens", type=int, default=100, help="tokens to write (default: 100)")
    options.add_argument("--number", type=int, default=3, help="how many texts (default: 3)")
    options.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    options.add_argument("--top-k", type=int, default=50, help="choose among this many tokens (default: 50)")
    options.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    given = options.parse_args(arguments)
    try:
        texts = sample(given)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    for text in texts:
        print(f"{text}\n---")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
