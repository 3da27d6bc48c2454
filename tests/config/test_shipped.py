"""A configuration is found by its name: in the current folder first, then among those that come
with scmoe."""

from pathlib import Path

import pytest

from experiments.tables.table_file import load_table
from scmoe.config.leaves import ConfigError
from scmoe.config.load import SHIPPED, find, load_config, shipped_and_own
from scmoe.sweeps.sweep_file import read

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The tests run in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "quickstart.yaml",
        "configs/quickstart.yaml",
        "configs/quickstart",
        "experiment/table3/small",
    ],
)
def test_every_shipped_configuration_has_names(name):
    path = find(name)
    assert path.samefile(
        ROOT / "configs" / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    )
    assert load_config(name).name == load_config(path).name


def test_the_links_of_the_package_are_the_folders_of_the_repository():
    for name in ("configs", "datamodules"):
        assert (ROOT / "scmoe" / name).is_symlink() and (ROOT / "scmoe" / name).samefile(
            ROOT / name
        )
    assert SHIPPED.samefile(ROOT / "configs")


def test_the_current_folder_comes_first():
    Path("configs").mkdir()
    for place in ("configs/quickstart.yaml", "quickstart.yaml"):
        Path(place).write_text(f"name: {place.replace('/', '-')}\n")
        assert find("quickstart") == Path(place)
        assert load_config("quickstart").name == place.replace("/", "-")
    assert load_config("configs/quickstart.yaml").name == "configs-quickstart.yaml"
    assert shipped_and_own()["configs/quickstart.yaml"] == Path("configs/quickstart.yaml")
    Path("debug").mkdir()  # a folder is no configuration
    assert load_config("debug").name == "debug"


def test_a_file_may_extend_a_shipped_one_by_name():
    Path("mine.yaml").write_text(
        "extends: [quickstart, configs/strategy/single.yaml]\nname: mine\n"
    )
    mine, theirs = load_config("mine"), load_config("quickstart")
    assert (mine.name, mine.strategy.ep_size, mine.model) == ("mine", 1, theirs.model)


def test_an_unknown_name_is_refused_with_the_verb_that_lists_them():
    with pytest.raises(ConfigError, match=r"^quikstart: .* did you mean quickstart\?"):
        load_config("quikstart")


def test_tables_and_sweeps_are_found_too():
    assert load_table("table3").rows == load_table("table3", ROOT / "configs/experiment").rows
    assert read("sweep/smoke").config == "configs/debug.yaml"
