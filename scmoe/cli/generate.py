import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from scmoe.command_line import HYPHENS, Count, OneEach
from scmoe.config.leaves import ConfigError
from scmoe.report import say

AT_LEAST_0 = Parameter(validator=validators.Number(gte=0))


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """Which texts are continued, and how.

    Args:
        which: checkpoint
        prompt: text to continue (default: the start of a document)
        prompts: JSON lines: {"prompt": "..."} or {"prompt": "...", "seed": 7}
        out: where the texts of --prompts go, as JSON lines
        max_tokens: new tokens of a text at most (default: 100, or what fits beside the longest
            prompt of all)
        temperature: 0: always the likeliest token
        top_k: choose among this many of the most likely tokens; 0: among all
        top_p: choose among the most likely tokens that have this probability together
        repetition_penalty: above 1: tokens of the text so far become less likely
        stop: text that ends a text; may be repeated
        seed: of the first text; others count up from it
        batch_size: texts of a rank at a time
        prefill_tokens: tokens of a prompt that one pass reads (default: all)
    """

    which: Literal["last", "best"] = "last"
    prompt: Annotated[str | None, HYPHENS] = None
    prompts: Path | None = None
    out: Path | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, AT_LEAST_0] = 0.8
    top_k: Annotated[int, AT_LEAST_0] = 50
    top_p: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=1))] = 1.0
    repetition_penalty: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 1.0
    stop: OneEach[str] = ()
    seed: int = 0
    batch_size: Count = 8
    prefill_tokens: Count | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) != (self.out is None):
            raise ConfigError("--prompts and --out go together")
        if self.prompts is None or self.out is None:
            return
        if self.prompt is not None:
            raise ConfigError("--prompt and --prompts exclude each other")
        if self.prompts.resolve() == self.out.resolve():
            raise ConfigError(
                f"--out is {str(self.out)!r}, which is the file of --prompts. Give another file."
            )


DEFAULT_OPTIONS = Options()


def main(run: Path, /, *overrides: str, options: Options = DEFAULT_OPTIONS) -> None:
    """Continue texts with the model of a run or of an export, whatever number of ranks the run had.

    One text is shown as it is written. With --prompts FILE the texts go to --out FILE, as JSON
    lines; several ranks (trainer.devices=2) share the prompts and the experts. The model is
    dropless, whatever its capacity factor.

    Args:
        run: directory of a run, such as runs/latest, or an exported file
        overrides: key=value, what a resumed run may change, too
    """
    from scmoe.inference.prompts import Prompt, check_prompt, read_prompts
    from scmoe.training.run.directory import refuse_without_checkpoint

    if not run.is_file():
        refuse_without_checkpoint(run.resolve(), options.which)
    try:
        if options.prompts is not None:
            texts = read_prompts(options.prompts, options.seed)
        else:
            texts = [Prompt(options.prompt, options.seed)]
            check_prompt(texts[0], "--prompt")
        from scmoe.inference.sampling import Sampling
        from scmoe.runs.generate import GenerationRequest, generate_texts, speed_lines, to_file

        sampling = Sampling(
            options.temperature, options.top_k or None, options.top_p, options.repetition_penalty
        )
        request = GenerationRequest(
            texts,
            options.max_tokens,
            sampling,
            tuple(options.stop),
            options.which,
            options.batch_size,
            options.prefill_tokens,
            overrides,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if options.out is None:
        speed = generate_texts(
            run.resolve(), request, lambda text: print(), partial(print, end="", flush=True)
        )
    else:
        with to_file(options.out) as write:
            speed = generate_texts(run.resolve(), request, write)
    if speed is not None:
        say("\n".join(speed_lines(speed)))
        if options.out is not None:
            print(json.dumps(speed), flush=True)
