"""Continue texts with the model of a run or of an export, whatever number of ranks the run had.

One text is shown as it is written. With --prompts FILE the texts go to --out FILE, as JSON lines; several ranks
(trainer.devices=2) share the prompts and the experts. The model is dropless, whatever its capacity factor.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments import command, parser


@command
def main(arguments: list[str]) -> int:
    options = parser("generate", __doc__)
    options.add_argument("run", type=Path, help="directory of a run, such as runs/latest, or an exported file")
    options.add_argument("overrides", nargs="*", metavar="key=value", help="what a resumed run may change, too")
    options.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint (default: last)")
    options.add_argument("--prompt", help="text to continue (default: the start of a document)")
    options.add_argument("--prompts", type=Path, help='JSON lines: {"prompt": "..."} or {"prompt": "...", "seed": 7}')
    options.add_argument("--out", type=Path, help="where the texts of --prompts go, as JSON lines")
    options.add_argument("--max-tokens", type=int, help="new tokens of a text at most (default: 100, or what fits)")
    options.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    options.add_argument("--top-k", type=int, default=50, help="choose among so many; 0: all (default: 50)")
    options.add_argument("--top-p", type=float, default=1.0, help="choose among this probability (default: 1)")
    options.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer (default: 1)")
    options.add_argument("--stop", action="append", default=[], help="text that ends a text; may be repeated")
    options.add_argument("--seed", type=int, default=0, help="of the first text; others count up from it (default: 0)")
    options.add_argument("--batch-size", type=int, default=8, help="texts of a rank at a time (default: 8)")
    options.add_argument("--prefill-tokens", type=int, help="tokens of a prompt that one pass reads (default: all)")
    options.add_argument("--plan", action="store_true", help="measure first how ranks overlap prefill and decode best")
    given = options.parse_intermixed_args(arguments)
    if (given.prompts is None) != (given.out is None):
        options.error("--prompts and --out go together")
    if given.prompts is not None and given.prompt is not None:
        options.error("--prompt and --prompts exclude each other")
    from scmoe.studies.generation import generate_texts, speed_lines

    request = request_of(given)
    how = (lambda text: print(), say) if given.out is None else (to_file(given.out),)
    try:
        speed = generate_texts(given.run.resolve(), request, *how)
    except KeyboardInterrupt:
        return 130
    if speed is not None:
        print(*speed_lines(speed), sep="\n", file=sys.stderr)
    if speed is not None and given.out is not None:
        print(json.dumps(speed), flush=True)
    return 0


def request_of(given: Any) -> Any:
    """Return the library's Request. ConfigError: a value or the file of prompts is not allowed."""
    from scmoe.inference.prompts import Prompt, check_prompt, read_prompts
    from scmoe.inference.sampling import Sampling
    from scmoe.studies.generation import Request

    try:
        sampling = Sampling(given.temperature, given.top_k or None, given.top_p, given.repetition_penalty)
        if given.prompts is not None:
            prompts = read_prompts(given.prompts, given.seed)
        else:
            prompts = [Prompt(given.prompt, given.seed)]
            check_prompt(prompts[0], "--prompt")
        how = given.max_tokens, sampling, tuple(given.stop), given.which, given.batch_size, given.prefill_tokens
        return Request(prompts, *how, given.plan, given.overrides)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def say(text: str) -> None:
    print(text, end="", flush=True)


def to_file(path: Path) -> Callable[[dict[str, Any]], None]:
    """Return a function that appends lines to a new file, which only rank 0 makes."""
    from scmoe.parallel.lightning_seam import rank_without_trainer

    try:
        file = path.open("w", encoding="utf-8") if rank_without_trainer() == 0 else None
    except OSError as error:
        raise ConfigError(f"--out is {path}, allowed: a file that can be written: {error}") from error

    def write(text: dict[str, Any]) -> None:
        assert file is not None
        file.write(json.dumps(text, ensure_ascii=False) + "\n")
        file.flush()

    return write


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
