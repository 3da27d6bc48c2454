"""Lets lm-eval (extra `eval`) ask the questions of a task, and the model of a run answer them.

Tasks are handed over as objects in memory, so nothing is looked up or downloaded. Contexts begin with the end of text,
as documents do in training; a context that is too long loses its beginning.
"""

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from scipy.stats import binomtest

from scmoe.datamodules.tokenizer import Tokenizer
from scmoe.runs.evaluate.scoring import Scorer
from scmoe.runs.evaluate.tasks import Task

METRICS = ("acc", "acc_norm", "acc_mutual_info")
CONFIDENCE = 0.95


class ModelOfRun(LM):
    """The model of a run, as lm-eval calls models."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer, self.tokenizer = scorer, tokenizer

    def loglikelihood(self, requests: list[Instance], *_: Any, **__: Any) -> list[tuple[float, bool]]:
        scores = self.scorer([self.ids_of(*request.args) for request in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], *_: Any, **__: Any) -> list[float]:
        return [score.log_likelihood for score in self.scorer([self.ids_of("", *request.args) for request in requests])]

    def generate_until(self, requests: list[Instance], *_: Any, **__: Any) -> list[str]:
        raise NotImplementedError(
            "generate_until: tasks that generate text are not supported, only those that score it"
        )

    def ids_of(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Return the end of text and the ids of both, and the index of the continuation's first id.

        They are encoded together. Spaces at the end of the context belong to the continuation, because a token of a
        word includes the space before it.
        """
        stripped = context.rstrip(" ")
        whole = self.tokenizer.encode(context + continuation)
        begin = min(len(self.tokenizer.encode(stripped)), len(whole) - 1)
        return np.r_[self.tokenizer.end_of_text, whole], 1 + begin


def ask(model: ModelOfRun, task: Task, limit: int | None) -> dict[str, Any]:
    """Return the accuracy of a model in the first `limit` questions of a task, with its interval and chance level.

    interval: where the true accuracy is with 95 % confidence (binomial, Clopper and Pearson). one_answer: the accuracy
    of the best constant answer, where all questions have the same choices (yes or no, A to D).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is for its own command line
    asked = task._replace(questions=task.questions[:limit])
    tasks = {"tasks": {task.name: as_lm_eval_task(asked)}}
    answered: Any = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, log_samples=False)
    found = answered["results"][task.name]
    metrics = {metric: float(found[f"{metric},none"]) for metric in METRICS if f"{metric},none" in found}
    accuracy, number = metrics[task.metric], len(asked.questions)
    interval = binomtest(round(accuracy * number), number).proportion_ci(CONFIDENCE)
    return {
        "accuracy": accuracy,
        "interval": [float(interval.low), float(interval.high)],
        "chance": asked.chance,
        "one_answer": asked.one_answer,
        "verdict": verdict(interval.low, interval.high, asked.chance, asked.one_answer),
        "questions": number,
        "of": len(task.questions),
        "from": task.origin,
        "judged_by": task.metric,
        **metrics,
    }


def verdict(low: float, high: float, chance: float, one_answer: float | None = None) -> str:
    """Say on which side of chance an interval lies; above it means above always giving the same answer, too."""
    return "above chance" if low > max(chance, one_answer or 0) else "below chance" if high < chance else "at chance"


def as_lm_eval_task(task: Task) -> ConfigurableTask:
    """Return a task as lm-eval takes it: without examples before a question, and a space before what follows."""
    rows = [{"context": q.context, "choices": [*q.choices], "gold": q.gold, "end": q.end} for q in task.questions]
    beginnings = task.questions[0].end is not None  # lm-eval then expects the answer as text and the end as target
    text, target = ("gold", "end") if beginnings else ("context", "gold")
    metrics = ["acc"] if beginnings else ["acc", "acc_norm", *{task.metric} - {"acc", "acc_norm"}]
    config = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_target": target,
        "doc_to_choice": "choices",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }
    return ConfigurableTask(config=config)


def ask_all(model: ModelOfRun, tasks: Sequence[Task], limit: int | None) -> dict[str, dict[str, Any]]:
    """Return the answers by task. Each task is asked alone, so that no score depends on which others are asked."""
    return {task.name: ask(model, task, limit) for task in tasks}
