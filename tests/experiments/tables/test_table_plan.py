"""A table's plan is refused, or made again by the command that it names."""

import shlex
from pathlib import Path

import pytest

from experiments.tables.table_file import TableOptions, load_table
from experiments.tables.table_plan import plan_table
from scmoe.config.leaves import ConfigError

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs/experiment"


def test_what_a_table_cannot_honour_is_refused(tmp_path):
    plan_table(
        load_table("table4", CONFIGS),
        TableOptions(jobs=1),
        [f"runs_dir={tmp_path}", "trainer.devices=2"],
    )
    table, own = load_table("table4", CONFIGS), [f"runs_dir={tmp_path}"]
    for options, words, says in (
        (TableOptions(to=tmp_path / "tables"), (), "--to is .*, where the table itself is made"),
        (TableOptions(seeds=0), (), "--seeds is 0"),
        (TableOptions(), ("trainer.devices=2",), "--jobs is 0, but a run has 2 ranks"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan_table(table, options, [*own, *words])
    with pytest.raises(ConfigError, match=r"table is 'table33', allowed: .*table3"):
        load_table("table33", CONFIGS)


def test_the_command_of_a_plan_makes_it_again(tmp_path):
    """A word that a shell would take apart is quoted."""
    words = [f"runs_dir={tmp_path}", "optim.lr=0.1", 'logger={project: "it\'s $HOME"}']
    plan = plan_table(load_table("table4", CONFIGS), TableOptions(seeds=3, to=tmp_path), words)
    *_, arguments = shlex.split(plan.command)
    seen = shlex.split(arguments.removeprefix("ARGS=").replace("$$", "$"))
    assert seen == ["--seeds", "3", *words[1:]]
    assert plan.command.startswith("make table TABLE=table4 SCALE=smoke ARGS=")


def test_a_table_without_its_data_set_runs_at_another_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the paths of data sets are relative
    plan = plan_table(
        load_table("table1", CONFIGS), TableOptions("small"), [f"runs_dir={tmp_path}"]
    )
    assert (plan.scale_name, plan.folder.name) == ("digits", "table1-digits")


def test_a_folder_for_results_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    options = TableOptions(seeds=1, to=tmp_path / "file")
    with pytest.raises(ConfigError, match="--to cannot be written"):
        plan_table(load_table("table4"), options, [f"runs_dir={tmp_path}"])


def test_short_trials_make_no_table(tmp_path):
    words = [f"runs_dir={tmp_path}", "trainer.fast_dev_run=true"]
    with pytest.raises(ConfigError, match=r"^trainer\.fast_dev_run is true, but a table"):
        plan_table(load_table("table4", CONFIGS), TableOptions(), words)
