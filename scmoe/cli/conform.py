from typing import Literal

from scmoe.command_line import Count
from scmoe.config.leaves import ConfigError

MODULES_OF_RANKS: list[str] = []  # modules that ranks need, beside those of the layer


def main(
    layer: str,
    /,
    *,
    ranks: tuple[Literal["1", "2", "4", "2x2"], ...] = ("1", "2", "4", "2x2"),
    questions: tuple[str, ...] = (),
    dtype: Literal["float64", "float32", "bfloat16"] = "float64",
    limit_s: Count = 60,
) -> int:
    """Ask an expert-parallel layer of your own whether it is right: n ranks against one process.

    A table goes to standard error, JSON to standard output. Exit code 1: a question failed.

    Args:
        layer: FILE.py:NAME of the function that makes an Adapter; pair:FILE.py:NAME; or hf:NAME
        ranks: numbers of ranks; 2x2 is two groups of two that share experts
        questions: names of those that are asked, all by default
        dtype: of all numbers
        limit_s: seconds that a question may take
    """
    from scmoe.conform.exam import Exam, pools_of
    from scmoe.conform.outcome import as_json, has_failed, progress, show
    from scmoe.conform.questions import QUESTION_NAMES
    from scmoe.conform.source import check_source, libraries_of
    from scmoe.report import print_result

    check_source(layer)
    if unknown := [name for name in questions if name not in QUESTION_NAMES]:
        raise ConfigError(
            f"{unknown[0]!r} is no question. Choose from: {', '.join(QUESTION_NAMES)}."
        )
    names = questions or tuple(QUESTION_NAMES)
    pools = pools_of(ranks, [*MODULES_OF_RANKS, *libraries_of(layer)])
    try:
        with progress(len(names) * len(ranks)) as advance:
            exam = Exam(layer, dtype, pools, ranks, names, float(limit_s), advance)
            answers = exam.run()
    finally:
        for pool in pools.values():
            pool.close()
    show(exam, answers)
    print_result(as_json(exam, answers))
    return int(has_failed(answers))
