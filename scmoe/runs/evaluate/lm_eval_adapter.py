"""lm-eval (extra `eval`) asks the questions of a task, and the model of a run answers them.

A task is a file of JSON lines, a YAML file of lm-eval, or a task of lm-eval by its name, with data
from the Hugging Face hub or its cache. Contexts begin with the end of text, as documents do in
training. A context that is too long loses its beginning.

A line of NAME.jsonl is one question, in one of two forms:

    {"query": "...", "choices": ["...", "..."], "gold": 1}
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}

In the second form (WinoGrande) the choices are the beginnings, and all have the same end.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
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
from scmoe.inference.generate import decode, padded, prefill
from scmoe.inference.sampling import Stopping
from scmoe.runs.evaluate.scoring import Scorer, batches, progress_counter

# The text between query and choice, as in lm-eval's tasks of these names. Others have a space.
PROMPTS = {"piqa": "Answer:", "arc_easy": "\nAnswer:", "boolq": "\nAnswer:"}
# Metrics that are means of ones and zeros. The first one that a task of lm-eval has judges it.
OF_ONES = ("acc", "acc_norm", "acc_mutual_info", "exact_match")
CONFIDENCE = 0.95


class Asked(NamedTuple):
    """A task, a group or a tag of lm-eval, under its name there.

    loaded: what lm-eval's TaskManager returns, with the data. file: of the questions, if they are
    JSON lines.
    """

    name: str
    loaded: Any
    file: Path | None = None


class EncodedPrompt(NamedTuple):
    """What the model reads, and where the text that it writes ends."""

    ids: list[int]
    stopping: Stopping

    @property
    def length(self) -> int:
        return len(self.ids) + self.stopping.max_tokens


class ModelOfRun(LM):
    """The model of a run, as lm-eval calls models."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = tokenizer

    def loglikelihood(
        self, requests: list[Instance], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self.ids_of(*request.args) for request in requests]
        scores = self.scorer(pairs, part=f"answers of {names_of(requests)}")
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], *_: Any, **__: Any) -> list[float]:
        pairs = [self.ids_of("", *request.args) for request in requests]
        scores = self.scorer(pairs, part=f"texts of {names_of(requests)}")
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Instance], *_: Any, **__: Any) -> list[str]:
        prompts = [self.prompt(*request.args) for request in requests]
        texts = [""] * len(prompts)
        with progress_counter(f"answers of {names_of(requests)}", len(prompts)) as advance:
            for batch in batches(range(len(prompts)), lambda i: prompts[i].length):
                for i, text in zip(batch, self.write([prompts[i] for i in batch]), strict=True):
                    texts[i] = text
                advance(len(batch))
        return texts

    def prompt(self, context: str, asked: dict[str, Any]) -> EncodedPrompt:
        """Return the end of text and the ids of a context; where they leave no room for the new
        tokens, the last ids of the context only.

        Raises ConfigError if the task samples, or its answers do not fit into the model's context.
        """
        longest = self.scorer.context
        end = self.tokenizer.end_of_text
        how: Any = normalize_gen_kwargs(asked, min(DEFAULT_MAX_GEN_TOKS, longest // 2))
        new = how["max_gen_toks"]
        strings = tuple(stop for stop in how["until"] if stop)
        if how["do_sample"]:
            raise ConfigError(
                "A task of --tasks samples its answers, which is not supported. Leave it out."
            )
        if new >= longest:
            raise ConfigError(
                f"A task of --tasks needs {new} new tokens, but data.seq_len is {longest}. Leave it"
                " out."
            )
        stopping = Stopping(new, frozenset({end}), strings, self.tokenizer.decode)
        ids = [end, *self.tokenizer.encode(context).tolist()]
        return EncodedPrompt(ids[new - longest :], stopping)

    def write(self, prompts: Sequence[EncodedPrompt]) -> list[str]:
        """Return the likeliest continuation of each prompt, token by token, before its first stop
        string."""
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
                return [
                    prompt.stopping.text(ids) for prompt, ids in zip(prompts, written, strict=True)
                ]
            logits_BV = decode(forward, ids_B, going, cache)

    def ids_of(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
        """Return the end of text and the ids of both, and the index of the continuation's first id.

        They are encoded together. Spaces at the end of the context belong to the continuation,
        because a token of a word includes the space before it.
        """
        stripped = context.rstrip(" ")
        ids = self.tokenizer.encode(context + continuation)
        begin = min(len(self.tokenizer.encode(stripped)), max(0, len(ids) - 1))
        return np.r_[self.tokenizer.end_of_text, ids], 1 + begin


def names_of(requests: Sequence[Instance]) -> str:
    """Return the names of the tasks that have made these requests."""
    return ", ".join(dict.fromkeys(str(request.task_name) for request in requests))


def ask(model: ModelOfRun, task: Asked, limit: int | None) -> dict[str, dict[str, Any]]:
    """Return the results of a model in the first `limit` questions of a task. A group of lm-eval
    has results for each of its tasks, and for the group.

    accuracy: the metric `judged_by`, which need not be an accuracy in a task of lm-eval. interval:
    None where the metric is no mean of ones and zeros, or of a group. chance, one_answer: as
    `guesses` returns them for a file of questions; None otherwise.
    """
    be_quiet()
    answered: Any = lm_eval.evaluate(
        lm=model, task_dict=task.loaded, limit=limit, bootstrap_iters=0, log_samples=False
    )

    results: dict[str, dict[str, Any]] = {}
    for name, result in answered["results"].items():
        numbers = {
            key: value
            for key, value in result.items()
            if "," in key and isinstance(value, int | float)
        }
        metrics = {
            key.removesuffix(",none"): float(value)
            for key, value in numbers.items()
            if "_stderr," not in key
        }
        if not metrics:
            continue
        judge = min(metrics, key=rank_of)
        counts = answered["n-samples"].get(name, {"effective": None, "original": None})
        is_mean = counts["effective"] and rank_of(judge) < len(OF_ONES)
        results[name] = {
            "accuracy": metrics[judge],
            "interval": interval_of(metrics[judge], counts["effective"]) if is_mean else None,
            "chance": None,
            "one_answer": None,
            "verdict": judge,
            "questions": counts["effective"],
            "of": counts["original"],
            "from": f"lm-eval {task.name}",
            "judged_by": judge,
            **metrics,
        }
    if task.file is not None:
        chance, one_answer = guesses(task.loaded["tasks"][task.name], limit)
        result = results[task.name]
        result["chance"] = chance
        result["one_answer"] = one_answer
        result["from"] = str(task.file)
        low, high = result["interval"]
        result["verdict"] = verdict(low, high, chance, one_answer)
    return results


def guesses(task: ConfigurableTask, limit: int | None) -> tuple[float, float | None]:
    """Return the expected accuracy of a guess in the first `limit` questions, and the accuracy of
    the best constant answer; None where choices differ between questions."""
    rows = [*islice(task.eval_docs, limit)]
    choices = [tuple(task.doc_to_choice(row)) for row in rows]
    chance = sum(1 / len(of_row) for of_row in choices) / len(rows)
    if len(set(choices)) > 1:
        return chance, None
    times = Counter(row["gold"] for row in rows)
    return chance, max(times.values()) / len(rows)


def rank_of(metric: str) -> int:
    """Return the place of a metric among OF_ONES; their number for any other."""
    name = metric.split(",")[0]
    return OF_ONES.index(name) if name in OF_ONES else len(OF_ONES)


def interval_of(mean: float, number: int) -> list[float]:
    """Return the 95 % confidence interval of a mean of `number` ones and zeros (binomial, Clopper
    and Pearson)."""
    bounds = binomtest(round(mean * number), number).proportion_ci(CONFIDENCE)
    return [float(bounds.low), float(bounds.high)]


def verdict(low: float, high: float, chance: float, one_answer: float | None = None) -> str:
    """Return on which side of chance an interval lies. "above chance" also means above the best
    constant answer."""
    if low > max(chance, one_answer or 0):
        return "above chance"
    return "below chance" if high < chance else "at chance"


def be_quiet() -> None:
    """Hide what lm-eval says: its advice is for its own command line."""
    for name in ("lm_eval", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it raises its errors too
    datasets.disable_progress_bars()


def read_file(file: Path) -> Asked:
    """Return the task of a file of JSON lines, which lm-eval asks without examples before a
    question, and with a space before the choice.

    Raises ConfigError if lm-eval cannot read it, or a line is no question.
    """
    be_quiet()
    try:
        data: Any = datasets.load_dataset("json", data_files={"test": str(file)})["test"]
        task = task_of(file.stem, data)
    except Exception as error:  # of the reader of data sets, and of lm-eval
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"lm-eval cannot read the task {file}: {reason}. A line is a JSON object with query,"
            " choices and gold."
        ) from error
    return Asked(file.stem, {"tasks": {file.stem: task}}, file)


def task_of(name: str, questions: datasets.Dataset) -> ConfigurableTask:
    """Return the task of some questions. Raises ValueError if one of them is none."""
    metrics = ["acc", "acc_norm"]
    asked = {"doc_to_text": "{{query.rstrip(' ')}}", "doc_to_target": "gold"}
    text, choices = "query", "choices"
    if name in PROMPTS:
        asked["doc_to_text"] = "{{query}}" + PROMPTS[name]
    if "context_options" in questions.column_names:  # lm-eval expects the answer as text
        metrics = ["acc"]
        asked = {"doc_to_text": "gold", "doc_to_target": "continuation"}
        text, choices = "continuation", "context_options"

    for number, row in enumerate(questions, 1):
        num_choices = len(row.get(choices) or ())
        if row.get(text) is None or num_choices < 2 or row.get("gold") not in range(num_choices):
            raise ValueError(
                f"question {number} has no {text}, less than two {choices}, or a gold that is none"
                " of them"
            )
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": questions},
        "test_split": "test",
        "output_type": "multiple_choice",
        **asked,
        "doc_to_choice": choices,
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }
    return ConfigurableTask(config=config)


def load_registered(names: Sequence[str], folder: Path | None) -> dict[str, Asked]:
    """Return tasks of the YAML files of a folder, or of lm-eval itself, whose list takes some
    seconds to read.

    Raises ConfigError if there is no such task, if it runs code that the model writes, or if
    lm-eval cannot load it or its data.
    """
    be_quiet()
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)

    registered = {}
    for name in names:
        if name not in manager.all_tasks:
            where = f"a file {name}.jsonl in the folder of --data"
            if folder is not None:
                where = f"{folder / name}.jsonl"
            near = get_close_matches(name, manager.all_tasks, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            allowed = f"{where}, a task of lm-eval ('lm-eval ls tasks')"
            raise ConfigError(f"--tasks has {name!r}, allowed: {allowed}{hint}")
        try:
            loaded: Any = manager.load([name])
        except Exception as error:  # of data sets, of a task's own code, of packages that it needs
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"lm-eval cannot load the task {name} of --tasks: {reason}. Its data come from the"
                " Hugging Face hub, or from its cache on this machine; or give them as"
                f" {name}.jsonl in the folder of --data."
            ) from error
        tasks = loaded["tasks"].items()
        if unsafe := [task for task, it in tasks if getattr(it, "UNSAFE_CODE", False)]:
            raise ConfigError(
                f"The task {unsafe[0]} of --tasks runs code that the model writes. Leave it out."
            )
        registered[name] = Asked(name, loaded)
    return registered
