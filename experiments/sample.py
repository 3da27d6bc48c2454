"""Write text with the newest checkpoint of a run: one process, whatever number of ranks the run had."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments import command, parser
from scmoe.config.fields import ConfigError


@command
def main(arguments: list[str]) -> int:
    options = parser("sample", __doc__)
    options.add_argument("run", type=Path, help="a run's directory, such as runs/latest")
    options.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    options.add_argument("--tokens", type=int, default=100, help="tokens to write (default: 100)")
    options.add_argument("--number", type=int, default=3, help="how many texts (default: 3)")
    options.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    options.add_argument("--top-k", type=int, default=50, help="choose among this many tokens (default: 50)")
    options.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    given = options.parse_args(arguments)
    from scmoe.studies.sample import sample

    try:
        texts = sample(given.run, given.prompt, given.number, given.tokens, given.temperature, given.top_k, given.seed)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(str(error)) from error
    for text in texts:
        print(f"{text}\n---")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
