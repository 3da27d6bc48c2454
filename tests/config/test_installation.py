"""A package that is not installed is named in one line, with a command that installs it; the extras
are pyproject's."""

import importlib
import re
import sys
import tomllib
from pathlib import Path, PurePosixPath

import omegaconf
import pytest

from scmoe.cli import list as verb
from scmoe.command_line import call
from scmoe.config import installation
from scmoe.config.installation import EXTRAS, explained, install_command, require
from scmoe.config.leaves import ConfigError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE_OF = {
    "sklearn": "scikit-learn",
    "lm_eval": "lm-eval",
}  # where it has another name than its module


def names(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[<>=!]", requirement)[0] for requirement in requirements]


def test_the_table_is_that_of_the_project():
    stated = PROJECT["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert sorted(names(stated[extra])) == sorted(
            PACKAGE_OF.get(module, module) for module in modules
        )
    (everything,), dev = stated["all"], stated["dev"][-1]
    assert {"data", "plots", "stats", "wandb"} == set(
        everything.removeprefix("scmoe[").removesuffix("]").split(",")
    )
    assert "scmoe[all," in dev, "make setup installs what every verb needs"
    assert not {*names(PROJECT["dependencies"])} & {
        PACKAGE_OF.get(m, m) for ms in EXTRAS.values() for m in ms
    }


def test_the_command_is_that_of_a_checkout_or_names_the_packages(monkeypatch):
    assert install_command("scipy", "matplotlib") == "pip install -e '.[plots,stats]'"
    stated = ['tokenizers>=0.21; extra == "data"', 'scipy>=1.13; extra == "stats"', "torch>=2.10"]
    monkeypatch.setattr(installation, "CHECKOUT", Path("no-such-checkout"))
    monkeypatch.setattr(installation, "requires", lambda name: stated)
    assert install_command("tokenizers") == "pip install 'tokenizers>=0.21'"


class Installed:
    """A distribution with a package and a program in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = (
            folder,
            [PurePosixPath("scmoe/__init__.py"), PurePosixPath("bin/scmoe")],
        )

    def locate_file(self, file: str | PurePosixPath) -> Path:
        return self.folder / file


@pytest.mark.parametrize("package", ["ours", "another", "none"])
def test_the_next_command_names_the_program_of_this_package(package, tmp_path, monkeypatch):
    """With another installation beside this Python, that one's program would run other code."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scmoe").touch()
    if package == "ours":
        (tmp_path / "scmoe").symlink_to(ROOT / "scmoe")
    elif package == "another":
        (tmp_path / "scmoe").mkdir()
        (tmp_path / "scmoe/__init__.py").touch()
    monkeypatch.setattr(installation, "distribution", lambda name: Installed(tmp_path))
    installation.own_program.cache_clear()
    command = installation.scmoe("runs")
    installation.own_program.cache_clear()
    assert (
        command.endswith("-m scmoe runs")
        if package == "another"
        else command == f"{tmp_path}/bin/scmoe runs"
    )


def test_what_is_missing_is_named(monkeypatch):
    require("a table", "torch")
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a table needs matplotlib, scipy: .*\[plots,stats\]"):
        require("a table", "matplotlib", "scipy")


def test_a_verb_that_finds_out_late_says_it_in_one_line(monkeypatch, capsys):
    def main(module: str, /) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(verb, "main", main)
    assert call("list", "matplotlib.axes") == 2
    assert (
        capsys.readouterr().err
        == "error: No module named 'matplotlib.axes': pip install -e '.[plots]'\n"
    )
    with pytest.raises(ModuleNotFoundError, match="misspelt"):  # a bug of ours keeps its traceback
        call("list", "scmoe.misspelt")
    assert explained(ModuleNotFoundError("no name")) is None


def test_an_older_omegaconf_is_named_when_the_configuration_is_imported(monkeypatch):
    """hydra-core 1.3 installs it."""
    monkeypatch.setattr(omegaconf, "__version__", "2.3.0")
    monkeypatch.delitem(sys.modules, "scmoe.config.load", raising=False)
    with pytest.raises(ConfigError, match=r"omegaconf 2\.3\.0 .* 'omegaconf>=2\.4'"):
        importlib.import_module("scmoe.config.load")
