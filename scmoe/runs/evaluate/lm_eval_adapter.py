"""Lets lm-eval (extra `eval`) ask the questions of a task, and the model of a run answer them.

Own tasks are handed over as objects in memory, so nothing is looked up or downloaded. Those of lm-eval are loaded by
name, with data from the Hugging Face hub or its cache. Contexts begin with the end of text, as documents do in
training; a context that is too long loses its beginning.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest

from scmoe.blocks.kv_cache import KVCache
from scmoe.config.leaves import ConfigError
from scmoe.datamodules.tokenizer import Tokenizer
from scmoe.inference.generate import padded
from scmoe.inference.passes import decode, prefill
from scmoe.inference.stopping import Stopping
from scmoe.runs.evaluate.scoring import BATCH_TOKENS, Scorer
from scmoe.runs.evaluate.tasks import Registered, Task

METRICS = ("acc", "acc_norm", "acc_mutual_info")
OF_ONES = (*METRICS, "exact_match")  # the mean of ones and zeros; the first one that a task has judges it
CONFIDENCE = 0.95


class Prompt(NamedTuple):
    """ids: what the model reads. stopping: where the text that it writes ends."""

    ids: list[int]
    stopping: Stopping

    @property
    def length(self) -> int:
        return len(self.ids) + self.stopping.max_tokens


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
        prompts = [self.prompt(*request.args) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -prompts[i].length)  # the longest first: little padding
        texts, start = [""] * len(prompts), 0
        while start < len(order):
            batch = order[start : start + max(1, BATCH_TOKENS // prompts[order[start]].length)]
            for i, text in zip(batch, self.write([prompts[i] for i in batch]), strict=True):
                texts[i] = text
            start += len(batch)
        return texts

    def prompt(self, context: str, asked: dict[str, Any]) -> Prompt:
        """Return the end of text and the last ids of a context, as many as leave room for the new tokens.

        ConfigError: the task samples, or its answers do not fit into the model's context."""
        longest, end = self.scorer.context, self.tokenizer.end_of_text
        how: Any = normalize_gen_kwargs(asked, min(DEFAULT_MAX_GEN_TOKS, longest // 2))
        new, strings = how["max_gen_toks"], tuple(stop for stop in how["until"] if stop)
        if how["do_sample"]:
            raise ConfigError("A task of --tasks samples its answers, which is not supported. Leave it out.")
        if new >= longest:
            raise ConfigError(f"A task of --tasks wants {new} new tokens, but data.seq_len is {longest}. Leave it out.")
        stopping = Stopping(new, frozenset({end}), strings, self.tokenizer.decode)
        return Prompt([end, *self.tokenizer.encode(context).tolist()][new - longest :], stopping)

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the likeliest continuation of each prompt, token by token, before its first stop string."""
        forward: Any = self.scorer.forward  # as a Decoder is called
        device = self.scorer.device
        ids_BS, mask_BS = (t.to(device) for t in padded([prompt.ids for prompt in prompts]))
        cache = KVCache(len(prompts), max(prompt.length for prompt in prompts), device)
        logits_BV = prefill(forward, ids_BS, mask_BS, cache)
        written: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        while True:
            ids_B = logits_BV.argmax(-1)
            for row, token in enumerate(ids_B.tolist()):
                if going[row]:
                    written[row].append(token)
                    going[row] = prompts[row].stopping.reason(written[row]) is None
            if not any(going):
                return [prompt.stopping.text(ids) for prompt, ids in zip(prompts, written, strict=True)]
            logits_BV = decode(forward, ids_B, going, cache)

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

    one_answer: the accuracy of the best constant answer, where all questions have the same choices (yes or no, A to D).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its advice is for its own command line
    asked = task._replace(questions=task.questions[:limit])
    tasks = {"tasks": {task.name: as_lm_eval_task(asked)}}
    answered: Any = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, log_samples=False)
    found = answered["results"][task.name]
    metrics = {metric: float(found[f"{metric},none"]) for metric in METRICS if f"{metric},none" in found}
    accuracy, number = metrics[task.metric], len(asked.questions)
    low, high = interval_of(accuracy, number)
    return {
        "accuracy": accuracy,
        "interval": [low, high],
        "chance": asked.chance,
        "one_answer": asked.one_answer,
        "verdict": verdict(low, high, asked.chance, asked.one_answer),
        "questions": number,
        "of": len(task.questions),
        "from": task.origin,
        "judged_by": task.metric,
        **metrics,
    }


def interval_of(mean: float, number: int) -> list[float]:
    """Return where the true mean of `number` ones and zeros is with 95 % confidence (binomial, Clopper and Pearson)."""
    bounds = binomtest(round(mean * number), number).proportion_ci(CONFIDENCE)
    return [float(bounds.low), float(bounds.high)]


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


def load_registered(names: Sequence[str], folder: Path | None) -> dict[str, Registered]:
    """Return tasks of the YAML files of a folder, or of lm-eval itself, whose list takes some seconds to read.

    ConfigError: there is no such task, it runs code that it generates, or lm-eval cannot load it or its data."""
    for quiet in ("lm_eval", "huggingface_hub"):
        logging.getLogger(quiet).setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    found = {}
    for name in names:
        if name not in manager.all_tasks:
            where = f"a file {name}.jsonl in the folder of --data" if folder is None else f"{folder / name}.jsonl"
            raise ConfigError(
                f"--tasks has {name!r}, allowed: cloze, next_sentence, {where}, a task of lm-eval ('lm-eval ls tasks')"
            )
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # of data sets, of a task's own code, of packages that it needs
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"lm-eval cannot load the task {name} of --tasks: {reason}. Its data come from the Hugging Face hub, "
                f"or from its cache on this machine; or give them as {name}.jsonl in the folder of --data."
            ) from error
        if unsafe := [task for task, it in loaded["tasks"].items() if getattr(it, "UNSAFE_CODE", False)]:
            raise ConfigError(f"The task {unsafe[0]} of --tasks runs code that the model writes. Leave it out.")
        found[name] = Registered(name, loaded)
    return found


def ask_registered(model: ModelOfRun, task: Registered, limit: int | None) -> dict[str, dict[str, Any]]:
    """Return what lm-eval finds for a task, or for each task of a group and the group itself, as `ask` does.

    accuracy: the metric `judged_by`, which may be another than an accuracy. interval: None where it is no mean of ones
    and zeros, or of a group. Chance is not known."""
    answered: Any = lm_eval.evaluate(lm=model, task_dict=task.loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    found = {}
    for name, result in answered["results"].items():
        numbers = {key: value for key, value in result.items() if "," in key and isinstance(value, int | float)}
        metrics = {key.removesuffix(",none"): float(value) for key, value in numbers.items() if "_stderr," not in key}
        judges = sorted(metrics, key=lambda key: [*OF_ONES, key.split(",")[0]].index(key.split(",")[0]))
        if not judges:
            continue
        counts = answered["n-samples"].get(name, {"effective": None, "original": None})
        number, mean, interval = counts["effective"], metrics[judges[0]], None
        if number and judges[0].split(",")[0] in OF_ONES:
            interval = interval_of(mean, number)
        found[name] = {
            "accuracy": mean,
            "interval": interval,
            "chance": None,
            "one_answer": None,
            "verdict": judges[0],
            "questions": number,
            "of": counts["original"],
            "from": f"lm-eval {task.name}",
            "judged_by": judges[0],
            **metrics,
        }
    return found


def ask_all(model: ModelOfRun, tasks: Sequence[Task | Registered], limit: int | None) -> dict[str, dict[str, Any]]:
    """Return the answers by task. Each task is asked alone, so that no score depends on which others are asked."""
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        found |= {task.name: ask(model, task, limit)} if isinstance(task, Task) else ask_registered(model, task, limit)
    return found
