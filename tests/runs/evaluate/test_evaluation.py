"""An evaluation is bit-identical on any number of ranks; its results are kept and logged."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.engine.ranks import RankError, run_ranks
from scmoe.config.load import load_config
from scmoe.parallel.checkpoint import loading
from scmoe.parallel.mesh import Mesh
from scmoe.runs.evaluate import evaluation, scoring
from scmoe.runs.evaluate.scoring import Scorer, run_on_rank_zero, score_test_split
from tests.support.commands import called, command_in_ranks, train_on_text
from tests.support.lm_eval_tasks import write_task, writing
from tests.support.sentences import sentences
from tests.support.wandb_server import wandb_server

pytestmark = pytest.mark.ranks

# with a capacity that drops, chunks, and what only ranks have; the second with W&B
ARCHITECTURES = {
    "scmoe": (
        "moe.capacity_factor=1",
        "schedule.chunks=2",
        "strategy.wire_dtype=bfloat16",
        "strategy.dense=sharded",
    ),
    "dgmoe": (
        *(
            "moe.architecture=dgmoe",
            "moe.capacity_factor=null",
            "moe.rows=buffers",
            "moe.dropless_ceiling=2",
        ),
        "logger.mode=offline",
    ),
}

ABC = "abcdefghijklmnopqrstuvwxyz the of and"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return the directories of runs of two ranks on a small text."""
    sizes = ("data.seq_len=32", "trainer.max_steps=3", "moe.noisy=false")
    return {
        name: train_on_text(tmp_path_factory.mktemp(name), 2, *sizes, *overrides)
        for name, overrides in ARCHITECTURES.items()
    }


def evaluated(world_size: int, run_dir: Path, *words: str) -> dict[str, Any]:
    """Return the results without W&B. One rank is this process, which imports lm-eval once."""
    words = (str(run_dir), f"trainer.devices={world_size}", "logger.mode=disabled", *words)
    if world_size == 1:
        return called("evaluate", *words).summary
    return command_in_ranks(
        "evaluate", world_size, *words, HF_DATASETS_CACHE=str(run_dir / "datasets")
    ).summary


def file_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / evaluation.FILE).read_text())


@pytest.mark.faults
def test_tasks_on_ranks_have_the_bits_of_one_process(runs, tmp_path, monkeypatch):
    """`write` is a task of lm-eval whose answers the model writes, scored by the letters that they
    share with ABC."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows").write_text(
        "\n".join(json.dumps({"query": "The " * n, "answer": ABC}) for n in range(6))
    )
    question = {"query": "The", "choices": ["state", "war"]}
    (tmp_path / "mine.jsonl").write_text(
        "\n".join(json.dumps(question | {"gold": n % 2}) for n in range(6))
    )
    write_task(tmp_path, "write", writing(".", 8, "chrf"))
    asked = (runs["scmoe"], "--limit", "6", "--tasks", "mine,write", "--data", str(tmp_path))
    alone = evaluated(1, *asked)
    assert set(alone) >= {"test_loss", "perplexity", "tasks"}
    assert set(alone["tasks"]) == {"mine", "write"} and alone["tasks"]["write"]["chrf"] > 0
    assert all(task["questions"] == 6 for task in alone["tasks"].values())
    kept = file_of(runs["scmoe"])
    assert evaluated(2, *asked) == alone
    assert file_of(runs["scmoe"]) == kept


def test_a_text_on_four_ranks_has_the_bits_of_one_process(runs):
    alone = evaluated(1, runs["dgmoe"])
    assert alone["perplexity"] > 0
    assert evaluated(4, runs["dgmoe"], "strategy.ep_size=2") == alone


def test_the_test_split_is_scored_in_batches_of_one_rank(runs, monkeypatch):
    """A capacity then applies to as many sequences as in the training. Without one, a batch has
    BATCH_TOKENS."""
    seen = []

    def spied(scorer: Scorer, data: Any) -> dict[str, Any]:
        seen.append(tuple(next(iter(data.test_dataloader()))["input_ids"].shape))
        return score_test_split(scorer, data)

    monkeypatch.setattr(evaluation, "score_test_split", spied)
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 32)
    for name in ("scmoe", "dgmoe"):
        evaluated(1, runs[name])
    assert seen == [(2, 32), (1, 32)]


def test_results_are_merged_by_what_was_asked(runs, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "other.txt").write_text(sentences(50, 9))
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"query": "The", "choices": ["state", "war"], "gold": 0})
        )
    folder = ("--data", str(tmp_path))
    run_dir = runs["scmoe"]
    (run_dir / evaluation.FILE).unlink(missing_ok=True)
    first = evaluated(1, run_dir, "--tasks", "yours", *folder, "--limit", "5")
    last = evaluated(1, run_dir, "--tasks", "mine", *folder, "--text", str(tmp_path / "other.txt"))
    best = evaluated(1, run_dir, "--which", "best", "--stride", "32")
    kept = file_of(run_dir)
    assert (last["checkpoint"], best["checkpoint"]) == ("step=3.ckpt", "best-step=2.ckpt")
    assert kept.keys() == {"step=3.ckpt", "best-step=2.ckpt"}
    of_last = kept["step=3.ckpt"]
    assert of_last["tasks"] == {"yours": first["tasks"]["yours"], "mine": last["tasks"]["mine"]}
    assert set(of_last["texts"]) == {"test split", str(tmp_path / "other.txt")}
    assert kept["best-step=2.ckpt"]["tasks"] == {} and best["text"]["stride"] == 32


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "folder"], "--data is 'folder'"),
        (["--stride", "33"], "--stride is 33, allowed: 1 to 32"),
        (["--limit", "0"], "--limit is 0"),
        (["--limit", "5"], "--limit counts questions"),
        (["--text", "/none.txt"], "--text is '/none.txt'"),
        (["moe.top_k=2"], "moe.top_k is 2, allowed: 1"),
        (["strategy.dense=sharded"], "strategy.dense is 'sharded'"),
        (["--tasks", "mine"], "pip install -e '.[eval]'"),
    ],
)
def test_a_wrong_request_is_one_line(runs, words, says, monkeypatch):
    if "mine" in words:
        monkeypatch.setattr("scmoe.config.installation.find_spec", lambda name: None)
    done = called("evaluate", str(runs["scmoe"]), *words)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert says in done.err


@pytest.mark.parametrize(
    ("module", "after", "code"),
    [(evaluation, "read_material", 2), (loading, "tensors_of", 2), (evaluation, "measure", 0)],
)
def test_a_checkpoint_may_be_replaced_meanwhile(runs, tmp_path, monkeypatch, module, after, code):
    """The run still trains. Before the checkpoint is read, or while it is, that is one line;
    afterwards it changes nothing."""
    run_dir = Path(shutil.copytree(runs["dgmoe"], tmp_path / "run"))
    whole = getattr(module, after)

    def replaced(*arguments: Any) -> Any:
        result = whole(*arguments)
        shutil.rmtree(run_dir / "checkpoints/step=3.ckpt", ignore_errors=True)
        return result

    monkeypatch.setattr(module, after, replaced)
    done = called("evaluate", str(run_dir), "logger.mode=disabled")
    assert done.code == code
    assert ("checkpoints/step=3.ckpt is gone: " in done.err) == (code == 2)


@pytest.mark.faults  # a W&B server; a run's own id: tests/training/run/test_loggers.py
def test_results_go_to_the_runs_own_wandb_run(runs):
    run_dir = runs["dgmoe"]
    words = ("evaluate", 1, str(run_dir), "logger.mode=online")
    with wandb_server() as server:
        found = command_in_ranks(*words, **server.variables).summary
        (arrived,) = server.runs.values()
    assert arrived.name == json.loads((run_dir / "wandb_run.json").read_text())["id"]
    assert arrived.column("eval/perplexity") == [found["perplexity"]]
    assert arrived.column("eval/test_loss") == [found["test_loss"]]
    assert arrived.config["trainer"]["devices"] == 2, "the config stays that of the training"


def test_trouble_with_wandb_loses_no_result(runs, monkeypatch, capsys):
    def fails(*_: Any) -> None:
        raise RuntimeError("no server\nat all")

    run_dir, config = runs["dgmoe"], load_config(runs["dgmoe"] / "config.yaml")
    monkeypatch.setattr(evaluation, "wandb_logger", fails)
    evaluation.log_to_wandb(
        run_dir, config, {"test": {"loss": 1.0}, "text": None, "tasks": {}, "step": 3}
    )
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no server" in err


def test_an_override_of_the_whole_section_reaches_wandb(runs, monkeypatch):
    modes = []
    monkeypatch.setattr(
        evaluation, "log_to_wandb", lambda run_dir, config, found: modes.append(config.logger.mode)
    )
    assert called("evaluate", str(runs["dgmoe"]), "logger={mode: disabled}").code == 0
    assert modes == ["disabled"]


# ---------------------------------------------------------------------- rank 0 and the others


def passes(rank: int, world_size: int, raises: bool) -> Any:
    """Join the ranks and let rank 0 make three passes; return what each rank has computed."""
    torch.distributed.init_process_group("gloo")
    mesh = Mesh(rank, world_size, control_group=torch.distributed.group.WORLD)
    seen = []

    def model(inputs: Tensor, mask: Tensor) -> tuple[Tensor]:
        total = mesh.sum_over_ranks(inputs * mask)
        seen.append(total.tolist())
        return (total,)

    def work(forward: Any) -> str:
        for i in range(3):
            forward(torch.tensor([i + 1.0]), torch.tensor([True]))
        if raises:
            raise ValueError("as wanted")
        return "done"

    return run_on_rank_zero(work, model, (torch.ones(1), torch.tensor([False])), mesh), seen


def test_ranks_take_part_in_every_pass_and_end_together():
    alone = [[1.0], [2.0], [3.0]]
    assert run_ranks(passes, 3, False) == [("done", alone), (None, alone), (None, alone)]


def slow(rank: int, world_size: int) -> Any:
    """Let rank 0 work longer than the timeout of a collective before its only pass."""
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    scoring.GO_ON_S, seen = 0.5, []

    def work(forward: Any) -> str:
        time.sleep(3)
        forward(torch.ones(1), None)
        return "done"

    mesh = Mesh(rank, world_size, control_group=group)
    padding = torch.ones(1), torch.tensor([False])
    result = run_on_rank_zero(work, lambda *inputs: seen.append(inputs), padding, mesh)
    return result, len(seen)


def test_rank_0_may_work_longer_between_passes_than_a_collective_may_take():
    assert run_ranks(slow, 2) == [("done", 1), (None, 1)]


def test_an_error_of_rank_0_lets_the_others_end():
    with pytest.raises(RankError, match="rank 0 of 2 failed first") as error:
        run_ranks(passes, 2, True)
    assert "as wanted" in str(error.value) and "rank 1, later" not in str(error.value)
