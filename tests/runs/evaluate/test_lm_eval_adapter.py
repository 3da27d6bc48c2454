"""Files of questions are checked, and lm-eval counts their answers as by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from scmoe.config.leaves import ConfigError
from scmoe.datamodules.tokenizer import make_tokenizer
from scmoe.inference.generate import generate
from scmoe.inference.sampling import Sampling, Stopping
from scmoe.runs.evaluate.evaluation import tasks_table
from scmoe.runs.evaluate.scoring import Score, Scorer
from tests.support.lm_eval_tasks import CHOOSE, write_task, writing
from tests.support.models import tiny, tiny_model
from tests.support.sentences import DATA, NO_DATA, sentences

SIX = {
    "piqa": 1838,
    "winogrande": 1267,
    "boolq": 3270,
    "arc_easy": 2376,
    "openbook_qa": 500,
    "math_qa": 2983,
}
TEXT = [sentences(60, seed) for seed in range(3)]
OTHER_FORM = {"context_options": ["he", "she"], "continuation": "runs.", "gold": 0}
LINE = {"query": "Why?", "choices": ["so", "no"], "gold": 1}
QUICK = ("boolq", "winogrande", "openbook_qa")  # of `make test`: every form of question


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """Return the adapter. lm-eval's data sets are cached in the test's folder, and its own list,
    which takes seconds, is not read."""
    adapter = pytest.importorskip(
        "scmoe.runs.evaluate.lm_eval_adapter", reason="needs the extra `eval`"
    )
    manager = adapter.TaskManager
    monkeypatch.setattr(
        adapter, "TaskManager", lambda **how: manager(**{**how, "include_defaults": False})
    )
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return adapter


def lookup(adapter, liked: set[tuple[str, str]]):
    """Return a model whose log-likelihood of an answer is minus its length, or 0 if it is liked."""

    def score(context: str, continuation: str) -> Score:
        return Score(
            0.0 if (context, continuation) in liked else -float(len(continuation)), 1, True
        )

    model = adapter.ModelOfRun(lambda pairs, part: [score(*pair) for pair in pairs], None)
    model.ids_of = lambda context, continuation: (context, continuation)
    return model


def written(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{"], ""),
        ([json.dumps(LINE), json.dumps(LINE | {"gold": 2})], "question 2 has"),
        ([json.dumps(LINE | {"choices": ["one"]})], "question 1 has"),
        ([json.dumps({"query": "Why?"})], "question 1 has"),
        ([json.dumps(LINE), json.dumps(LINE | {"query": None})], "question 2 has"),
        (["[1]"], ""),
        ([], ""),
        ([json.dumps(LINE), json.dumps(OTHER_FORM)], "question 1 has"),
    ],
)
def test_a_file_that_is_no_task_is_one_line_with_its_name(lines, says, adapter, tmp_path):
    file = written(tmp_path, "mine", [LINE])
    assert adapter.read_file(file).file == file
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"^.*mine\.jsonl: .*{says}.*$"):
        adapter.read_file(file)


def test_a_file_that_cannot_be_read_is_an_error_with_its_name(adapter, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(LINE).encode() + b"\xe9")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("latin", "folder"):
        with pytest.raises(ConfigError, match=rf"^.*{name}\.jsonl.*$"):
            adapter.read_file(tmp_path / f"{name}.jsonl")


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_DATA)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.faults) for name in SIX]
)
def test_the_papers_tasks_are_read_whole(name, adapter):
    task = adapter.read_file(DATA / f"{name}.jsonl").loaded["tasks"][name]
    assert len(task.eval_docs) == SIX[name]
    chance, one_answer = adapter.guesses(task, None)
    assert chance == (0.5 if name in ("piqa", "winogrande", "boolq") else 0.25)
    assert (one_answer is not None) == (name in ("boolq", "math_qa"))
    if name != "winogrande":
        assert not any(task.doc_to_text(row).endswith(" ") for row in task.eval_docs), (
            "the space is of what follows"
        )


def test_lm_eval_counts_what_the_model_prefers(adapter, tmp_path):
    rows = [
        {"query": f"{{{{q}}}} {i} ", "choices": ["aaaa", "bb", "cccccc"], "gold": i % 3}
        for i in range(30)
    ]
    task = adapter.read_file(written(tmp_path, "letters", rows))
    none = adapter.ask(lookup(adapter, set()), task, None)["letters"]
    assert (none["acc"], none["verdict"]) == (pytest.approx(1 / 3), "at chance"), (
        "bb is shortest in each question"
    )
    likes_all = lookup(
        adapter, {(row["query"].rstrip(), f" {row['choices'][row['gold']]}") for row in rows}
    )
    found = adapter.ask(likes_all, task, None)["letters"]
    assert (found["accuracy"], found["acc_norm"], found["verdict"]) == (1.0, 1.0, "above chance")
    assert found["interval"] == [pytest.approx(0.025 ** (1 / 30)), 1.0], (
        "Clopper and Pearson, where all are right"
    )
    seven = adapter.ask(likes_all, task, 7)["letters"]
    assert (seven["questions"], seven["of"], seven["one_answer"]) == (7, 30, 3 / 7)


def test_the_prompts_are_those_of_lm_evals_tasks(adapter, tmp_path):
    for name, end in (("piqa", "Answer:"), ("boolq", "\nAnswer:"), ("mine", "")):
        task = adapter.read_file(written(tmp_path, name, [LINE])).loaded["tasks"][name]
        assert task.doc_to_text(task.eval_docs[0]) == f"Why?{end}"


def test_where_beginnings_differ_the_end_is_scored(adapter, tmp_path):
    rows = [
        {"context_options": [f"he {i}", f"she {i}"], "continuation": "runs.", "gold": i % 2}
        for i in range(40)
    ]
    model = lookup(adapter, {(f"she {i}", " runs.") for i in range(40)})
    task = adapter.read_file(written(tmp_path, "pronouns", rows))
    found = adapter.ask(model, task, None)["pronouns"]
    assert found["accuracy"] == 0.5 and "acc_norm" not in found
    assert found["one_answer"] is None
    assert adapter.verdict(0.6, 0.7, 0.5, 0.65) == "at chance", "a constant answer can do it"
    assert (
        adapter.verdict(0.6, 0.7, 0.5) == "above chance"
        and adapter.verdict(0.3, 0.4, 0.5) == "below chance"
    )


def test_a_context_and_its_answer_are_encoded_as_one_text(adapter):
    tokenizer = make_tokenizer("bpe", 400, TEXT)
    model = adapter.ModelOfRun(None, tokenizer)
    pairs = (
        ("The state of the", " union."),
        ("The state of the ", "union."),
        ("", " peace"),
        ("a", "b"),
        ("", ""),
    )
    for context, answer in pairs:
        ids, first = model.ids_of(context, answer)
        assert ids[0] == tokenizer.end_of_text
        assert np.array_equal(ids[1:], tokenizer.encode(context + answer))
        assert tokenizer.decode(ids[first:]) == (" " * context.endswith(" ") + answer)


# ---------------------------------------------------------------------- lm-eval's own tasks


def lm_eval_folder(folder: Path, rows: list[dict[str, object]]) -> Path:
    (folder / "rows").write_text("\n".join(map(json.dumps, rows)))
    write_task(folder, "choose", CHOOSE)
    write_task(folder, "lost", CHOOSE, rows="none")
    return folder


def test_a_task_of_lm_eval_is_asked_under_its_own_name(adapter, tmp_path):
    rows = [{"query": f"{i}?", "choices": ["aaaa", "bb"], "gold": int(i < 3)} for i in range(4)]
    task = adapter.load_registered(["choose"], lm_eval_folder(tmp_path, rows))["choose"]
    found = adapter.ask(lookup(adapter, set()), task, 3)
    assert found.keys() == {"choose"}
    assert (found["choose"]["accuracy"], found["choose"]["questions"], found["choose"]["of"]) == (
        1.0,
        3,
        4,
    )
    assert found["choose"]["interval"][0] == pytest.approx(0.025 ** (1 / 3))
    assert tasks_table(found).row_count == 1


def test_answers_that_the_model_writes_are_those_of_generate(adapter, tmp_path):
    """In float64, for prompts of unequal length, and for one that is longer than the context."""
    tokenizer = make_tokenizer("bpe", 300, TEXT)
    network = tiny_model(
        tiny("data.vocab_size=300", "data.seq_len=16", "moe.capacity_factor=null")
    ).eval()
    prompts = [TEXT[0][:5], TEXT[1][:11], TEXT[2][:300]]
    ids = [[tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()][-10:] for prompt in prompts]
    assert len(ids[2]) == 10 and len(ids[0]) < len(ids[1])
    stopping = Stopping(6, frozenset({tokenizer.end_of_text}), decode=tokenizer.decode)
    texts = [
        stopping.text(generate(network, [one], stopping, Sampling(temperature=0))[0].ids)
        for one in ids
    ]
    stop = texts[1][-1]
    rows = [
        {"query": p, "answer": t.partition(stop)[0]} for p, t in zip(prompts, texts, strict=True)
    ]
    write_task(lm_eval_folder(tmp_path, rows), "write", writing(stop, 6, "exact_match"))
    model = adapter.ModelOfRun(Scorer(torch.no_grad()(network), 16, torch.device("cpu")), tokenizer)
    task = adapter.load_registered(["write"], tmp_path)["write"]
    found = adapter.ask(model, task, None)["write"]
    assert (found["accuracy"], found["judged_by"], found["questions"]) == (1.0, "exact_match", 3)
    assert len(set(texts)) == 3, "the model says something"
    for asked in ({"do_sample": True, "temperature": 1.0}, {"max_gen_toks": 16}):
        with pytest.raises(ConfigError):
            model.prompt("", asked)


@pytest.mark.parametrize(("name", "said"), [("lost", "lost"), ("chose", "did you mean choose")])
def test_a_task_that_lm_eval_cannot_load_is_one_line(name, said, adapter, tmp_path):
    with pytest.raises(ConfigError, match=rf"^.*{said}.*$"):
        adapter.load_registered([name], lm_eval_folder(tmp_path, [LINE]))
