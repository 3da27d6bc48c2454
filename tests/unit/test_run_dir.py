"""The name of a run's directory shows how the run differs from others; its last state is right however it ends."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities import rank_zero_only

from scmoe.config.load import load
from scmoe.training.run import lifetime
from scmoe.training.run.csv_logger import csv_logger
from scmoe.training.run.directory import SLUG_CHARS, create_run_dir, slug_of
from scmoe.training.run.lifetime import open_run
from tests.support.commands import rows_of

LONG = [f"moe.{key}=0.12345" for key in ("capacity_factor", "load_balance_coef", "z_loss_coef", "dropless_ceiling")]


@pytest.mark.parametrize(
    ("overrides", "slug"),
    [
        ([], ""),
        (["strategy.ep_size=2", "--optim.lr=1e-3"], "ep_size-2-lr-1e-3"),
        (["trainer.max_steps=20", "moe.architecture=shared_expert"], "architecture-shared_expert-max_steps-20"),
        (["name=a", "runs_dir=/b", "logger.mode=disabled", "trainer.progress=false", "data.cache_dir=/c"], ""),
        (["seed=1", "seed=2"], "seed-2"),
    ],
)
def test_a_slug_is_keys_and_values(overrides, slug):
    assert slug_of(overrides) == slug


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([*LONG, "strategy.ep_size=1"], [*LONG, "strategy.ep_size=2"]),
        (["data.path=" + "x" * 100], ["data.path=" + "x" * 101]),
        (["data.path=a/b"], ["data.path=a-b"]),
        (["data.path=a b"], ["data.path=a/b"]),
        (["data.path=\N{GREEK SMALL LETTER ALPHA}"], ["data.path=\N{GREEK SMALL LETTER BETA}"]),
    ],
)
def test_runs_that_differ_have_different_names(one, other):
    assert slug_of(one) != slug_of(other)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["data.path", "init_from", "seed"]), st.text()), max_size=4))
def test_a_slug_is_short_and_safe(pairs):
    slug = slug_of([f"{key}={value}" for key, value in pairs])
    assert len(slug.encode()) <= SLUG_CHARS + 9
    assert not set(slug) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-")


def test_two_runs_of_one_second_have_two_directories(tmp_path):
    dirs = {create_run_dir(tmp_path, "a", overrides, "") for overrides in ([], [], ["seed=2"], ["seed=2"])}
    assert len(dirs) == 4
    assert (tmp_path / "latest").resolve() in dirs


@pytest.mark.parametrize(
    ("error", "state"), [(None, "finished"), (SystemExit(0), "cut"), (ValueError("x"), "failed")], ids=str
)
def test_a_run_is_marked_and_closed_however_it_ends(error, state, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(lifetime, "close_loggers", lambda loggers, status: closed.append((len(loggers), status)))
    raised = None
    try:
        with open_run(load(None, ["logger.mode=disabled", f"runs_dir={tmp_path}"]), [], None, None) as (directory, _):
            assert json.loads((directory / "state.json").read_text())["state"] == "running"
            if error is not None:
                raise error
    except (SystemExit, ValueError) as caught:
        raised = caught
    assert raised is error, "it is not swallowed"
    assert json.loads((directory / "state.json").read_text())["state"] == state
    assert closed == [(1, "success" if error is None else "failed")]


def test_a_run_that_cannot_open_its_loggers_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(lifetime, "build_loggers", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), open_run(load(None, [f"runs_dir={tmp_path}"]), [], None, None):
        pass
    assert json.loads((tmp_path / "latest" / "state.json").read_text())["state"] == "failed"


def test_other_ranks_open_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with open_run(load(None, [f"runs_dir={tmp_path}"]), [], tmp_path / "a", None) as opened:
        assert opened == (None, [])
    assert not list(tmp_path.iterdir())


def test_a_half_row_of_an_earlier_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,step,z\n1.0,0,2.0\n1.0,1,2.0\n1.0")
    kept = csv_logger(tmp_path, 1).experiment
    assert rows_of(tmp_path / "metrics.csv") == [{"a": "1.0", "step": "0", "z": "2.0"}] and not kept.metrics
