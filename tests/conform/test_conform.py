"""What `scmoe conform` prints and returns, and the other ways in: a pair, ranks that share tokens,
bfloat16."""

import io
import json
from contextlib import redirect_stdout

import pytest
import torch

from experiments.engine.ranks import PRELOADED, run_ranks
from scmoe.cli import conform
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.conform.adapter import Adapter, Group
from scmoe.conform.equality import Difference, first_difference
from scmoe.conform.exam import PLACE_ALONE, Answer, Exam, pools_of
from scmoe.conform.outcome import reproducers
from scmoe.conform.plays import Seat, loaded
from scmoe.conform.problem import draw_weights
from scmoe.conform.questions import FIRST_QUESTIONS, QUESTION_NAMES, RAISES
from scmoe.conform.rank_pool import Played
from scmoe.conform.source import make_of
from tests.support.pages import ROOT

pytestmark = pytest.mark.ranks

LAYERS = ROOT / "tests/support/wrong_layers.py"
PASS = [question.name for question in FIRST_QUESTIONS]


@pytest.fixture(scope="module")
def pools():
    pools = pools_of([PLACE_ALONE, "2", "2x2"], PRELOADED)
    yield pools
    for pool in pools.values():
        pool.close()


def ask(pools, source, questions, dtype="float64", places=("2",), limit_s=60.0):
    exam = Exam(source, dtype, pools, places, questions, limit_s, lambda *_: None)
    answers = exam.run()
    return {name: {p: a.answer for p, a in of.items()} for name, of in answers.items()}


def test_a_pair_is_asked_with_experts_that_are_the_identity(pools):
    named = [name for name in PASS if name not in ("dense gradients", "expert gradients")]
    answers = ask(pools, f"pair:{LAYERS}:pair", named, places=(PLACE_ALONE, "2", "2x2"))
    assert {a for of in answers.values() for a in of.values()} == {"passed"}
    wrong = ask(pools, f"pair:{LAYERS}:detached_pair", named)
    assert [name for name in wrong if wrong[name]["2"] == "failed"] == [
        "input gradients",
        "router gradients",
    ]


def test_ranks_that_share_tokens(pools):
    questions = [*PASS, "unequal tokens", "a non-finite value on a rank"]
    answers = ask(pools, f"{LAYERS}:shared", questions, places=("2", "2x2"))
    unequal = answers.pop("unequal tokens")
    assert {a for of in answers.values() for a in of.values()} == {"passed"}
    assert unequal == {"2": "not asked", "2x2": "passed"}


def test_bfloat16_is_measured_by_its_own_spread(pools):
    right = ask(pools, f"{LAYERS}:make", PASS, "bfloat16")
    assert {a for of in right.values() for a in of.values()} == {"passed"}
    wrong = ask(pools, f"{LAYERS}:expert gradients not divided", PASS, "bfloat16")
    assert [name for name in wrong if wrong[name]["2"] != "passed"] == ["expert gradients"]


def test_a_rank_that_raises_costs_its_question_alone(pools):
    answers = ask(pools, f"{LAYERS}:raises on a rank", ["outputs"])
    assert answers == {"outputs": {"2": "crashed"}}
    assert ask(pools, f"{LAYERS}:make", ["outputs"]) == {"outputs": {"2": "passed"}}


def asked(capfd, monkeypatch, *words):
    """Return the exit code, the JSON and standard error of the command."""
    monkeypatch.setattr(conform, "MODULES_OF_RANKS", PRELOADED)
    code = call("conform", *words)
    out, err = capfd.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else None, err


def test_the_command_prints_a_table_and_json_and_a_script_that_shows_the_failure(
    capfd, monkeypatch
):
    layer = f"{LAYERS}:expert gradients not divided"
    words = ("--ranks", "2", "--questions", "outputs", "expert gradients")
    code, report, err = asked(capfd, monkeypatch, layer, *words)
    assert code == 1 and not report["passed"]
    outputs, gradients = (report["questions"][name]["2"] for name in words[3:])
    assert outputs == {"answer": "passed", "ratio": None}
    assert gradients["answer"] == "failed" and gradients["ratio"] == pytest.approx(2)
    assert "expert gradient/0/gate, rank 0, element [0, 0]" in gradients["why"]
    assert gradients["why"] in " ".join(err.split())

    script = report["reproducers"]["expert gradients"]
    assert "--nproc-per-node=2" in script
    printed = "".join(run_ranks(output_of, 2, script))
    wrong, right = (float(word) for word in printed.split() if word[0] in "-0123456789")
    assert wrong == pytest.approx(2 * right)


def output_of(rank: int, world_size: int, script: str) -> str:
    """Return what a script prints on this rank."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(script, {})
    return out.getvalue()


def test_a_layer_that_is_right_ends_with_0(capfd, monkeypatch):
    code, report, _ = asked(
        capfd, monkeypatch, f"{LAYERS}:make", "--ranks", "2", "--questions", "outputs"
    )
    assert code == 0 and report["passed"]


def test_what_does_not_exist_is_refused(capfd, monkeypatch):
    for words in (["nowhere.py:make"], [f"{LAYERS}"], [f"{LAYERS}:make", "--questions", "none"]):
        code, _, err = asked(capfd, monkeypatch, *words)
        assert code == 2 and err.startswith("error: ")
    assert QUESTION_NAMES[0] in err


def test_a_file_that_cannot_be_imported_ends_at_once(capfd, monkeypatch, tmp_path):
    broken = tmp_path / "broken_layer.py"
    broken.write_text("import nowhere\n", encoding="utf-8")
    code, _, err = asked(capfd, monkeypatch, f"{broken}:make", "--ranks", "1")
    assert code == 2 and "No module named 'nowhere'" in err


def test_a_file_with_the_name_of_another_module_is_refused(tmp_path):
    for name in ("random.py", "my.layer.py"):
        (tmp_path / name).write_text("def make(group, weights, dtype): ...\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="Rename the file"):
            make_of(f"{tmp_path / name}:make")


class Crashing:
    """A pool of ranks on which a layer cannot even be made."""

    def ask(self, asked, limit_s, grace_s=0.0):
        return Played("crashed", why="rank 0: ValueError")


def test_a_layer_that_cannot_be_made_does_not_pass_by_raising():
    pools = {PLACE_ALONE: Crashing(), "2": Crashing()}
    answers = Exam("layer.py:make", "float64", pools, ["2"], [RAISES], 1.0, lambda *_: None).run()
    assert answers[RAISES]["2"].answer == "crashed"


def test_a_tensor_of_another_shape_has_no_script():
    exam = Exam("a.py:make", "float64", {}, ["2"], [], 1.0, lambda *_: None)
    shape = Difference("output", 0, why="its shape is [3], not [4]")
    number = Difference("router gradient/router", 0, (0, 1), 2.0, 1.0, 2.0)
    answers = {
        "outputs": {"2": Answer("failed", shape)},
        "router gradients": {"2": Answer("failed", number)},
    }
    assert [*reproducers(exam, answers)] == ["router gradients"]


def test_a_process_that_ends_costs_its_question_alone(pools, tmp_path):
    """Also where it is the only one: the next question starts another."""
    layer = tmp_path / "ending_layer.py"
    text = "import os\n\n\ndef make(group, weights, dtype):\n    os._exit(3)\n"
    layer.write_text(text, encoding="utf-8")
    named = ["outputs", "recompute"]
    answers = ask(pools, f"{layer}:make", named, places=(PLACE_ALONE,))
    assert answers == {name: {PLACE_ALONE: "crashed"} for name in named}
    right = ask(pools, f"{LAYERS}:make", ["outputs"], places=(PLACE_ALONE,))
    assert right == {"outputs": {PLACE_ALONE: "passed"}}


class Together:
    """A pool of two ranks on which a layer works."""

    def ask(self, asked, limit_s, grace_s=0.0):
        return Played("played", ({"output": torch.ones(2, 2)},) * 2)


def test_a_measure_that_crashes_is_not_passed_over():
    pools = {PLACE_ALONE: Crashing(), "2": Together()}
    exam = Exam("layer.py:make", "float64", pools, ["2"], ["outputs"], 1.0, lambda *_: None)
    answer = exam.run()["outputs"]["2"]
    assert answer.answer == "crashed" and "ValueError" in answer.why


def test_a_checkpoint_may_have_tensors_that_conform_did_not_give():
    """Such as biases of experts, in a layer that is its own measure."""

    def make(group, weights, dtype):
        given = draw_weights(dtype).experts  # as if they had been loaded
        experts = {i: {**own, "bias": torch.ones(3)} for i, own in given.items()}

        def read_experts(read):
            return {i: {name: read(p) for name, p in own.items()} for i, own in experts.items()}

        return Adapter(
            forward=lambda x_TD: x_TD,
            experts=read_experts,
            dense=lambda read: {},
            load=lambda folder: None,
        )

    record = loaded(Seat(make, Group(0, 1, 1, None, None), torch.float64), "unused")
    assert "loaded/0/up" in record and "loaded/0/bias" not in record
    assert first_difference([record], {}, ["loaded"], {"loaded": 0.0}) is None
