"""A resumed run would measure its schedule again, and perhaps choose another one, which changes
bits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from scmoe.command_line import call
from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.planning.plan_file import plan_from_json, plan_to_json, read_plan
from scmoe.schedule.schedule import Schedule
from scmoe.training.callbacks.adaptive_schedule import plan_lines
from tests.support.commands import resume_in_ranks, train_in_ranks
from tests.support.played import WINDOW_OF_50_MS

pytestmark = [pytest.mark.ranks, pytest.mark.faults, pytest.mark.representative]

CHOSEN = 60  # steps until the choice at most, of three numbers of chunks


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """Return the directory of a finished run on two ranks whose schedule was chosen by
    measurement."""
    runs = tmp_path_factory.mktemp("planned")
    words = (
        "schedule=auto",
        "schedule.chunks=null",
        f"trainer.max_steps={CHOSEN + 1}",
        f"runs_dir={runs}",
    )
    # once, at the end
    saves = ("trainer.val_every=100", "trainer.checkpoint_every=100", "trainer.log_every=100")
    done = train_in_ranks(2, "configs/debug.yaml", "trainer.devices=2", *words, *saves)
    assert done.code == 0, done.err
    assert "plan: MoE layer 1: " in done.err
    return (runs / "latest").resolve()


@pytest.fixture
def run_dir(planned, tmp_path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "run"))


def resume(run_dir: Path, ranks: int, *overrides: str) -> str:
    """Return what a resumption of one step says of the plan."""
    words = (
        str(run_dir),
        f"trainer.max_steps={CHOSEN + 2}",
        f"trainer.devices={ranks}",
        *overrides,
    )
    done = resume_in_ranks(ranks, *words)
    assert done.code == 0, done.err
    return "\n".join(line for line in done.err.splitlines() if line.startswith("plan: "))


def test_a_resumed_run_goes_on_with_the_plan_of_its_directory(run_dir):
    """Its plan is put in place of the measured one, with a slot that no measurement of tiny
    operators would choose."""
    path = run_dir / "plan.json"
    plan = json.loads(path.read_text())
    assert plan["step"] <= CHOSEN and plan["conditions"]["ranks"] == 2
    plan["layers"][0]["schedule"] |= {"expert_slot": 3, "inside_attention": False, "chunks": 4}
    path.write_text(json.dumps(plan))
    said = resume(run_dir, 2)
    assert said.startswith("plan: MoE layer 1: scmoe pos2, slot 3 of 0 to 3, 4 chunk(s)")
    assert json.loads(path.read_text())["layers"][0]["schedule"] == plan["layers"][0]["schedule"]


def test_a_plan_says_eq_11_and_what_chunks_alone_would_hide():
    """Window and transfers are 50 ms each. At slot 2, 40 ms of the window run before the experts
    and 10 after, so 25 + 10 ms of the transfers are hidden. Two chunks alone hide the experts'
    10 ms."""
    choice = LayerChoice(Schedule("scmoe", "pos2", 2), WINDOW_OF_50_MS, (0.113, 0.0))
    plan, eq11 = plan_lines(ModelChoice((choice,)))
    assert "15.0 ms wait for transfers, 35.0 ms of transfers run beside computation" in plan
    assert "(3.5 times the 10.0 ms of chunks without a window)" in plan
    assert "slot 1, whose mismatch is 30.0 ms in forward; its bounds are 0.0 and 100.0 ms" in eq11
    unchunked = LayerChoice(choice.schedule, {1: WINDOW_OF_50_MS[1]}, choice.sequential)
    (plan, _) = plan_lines(ModelChoice((unchunked,)))
    assert plan.endswith("35.0 ms of transfers run beside computation"), "no chunks were measured"
    top_k = LayerChoice(Schedule("top_k"), WINDOW_OF_50_MS, choice.sequential)
    (plan, _) = plan_lines(ModelChoice((top_k,)))
    assert plan.endswith("wait for transfers"), "there is no window"


def test_a_plan_of_other_conditions_is_measured_again(run_dir):
    assert "plan: measured again, because chunks was [1, 2, 4] in " in resume(
        run_dir, 2, "schedule.chunks=2"
    )


@pytest.mark.parametrize(
    "key, other", [("ranks", 4), ("ep_size", 4), ("precision", "bf16-mixed"), ("new", 1)]
)
def test_each_condition_counts(key, other, planned):
    path = planned / "plan.json"
    plan = json.loads(path.read_text())
    assert read_plan(path, plan["conditions"]) == plan
    with pytest.raises(ValueError, match=f"^{key} was .* and is {other} now$"):
        read_plan(path, plan["conditions"] | {key: other})


@pytest.mark.parametrize("content", ["{", '{"layers": [{"schedule": {}}], "conditions": {}}', "[]"])
def test_a_damaged_plan_is_named_and_not_used(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_plan(path, {})


def test_a_plan_survives_its_file_and_is_drawn(planned, capsys, tmp_path):
    plan = json.loads((planned / "plan.json").read_text())
    choice = plan_from_json(plan)
    assert plan_to_json(choice, plan["conditions"], plan["step"]) == plan
    assert call("bench", "timeline", "--run", str(planned)) == 0
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    assert [Path(picture).read_bytes()[:4] for picture in pictures] == [b"\x89PNG"] * 2
    assert call("bench", "timeline", "--run", str(planned), "--ranks", "4") == 2, (
        "nothing is measured"
    )
    assert call("bench", "timeline", "--run", str(tmp_path)) == 2
    assert "Give a run with schedule=auto" in capsys.readouterr().err
