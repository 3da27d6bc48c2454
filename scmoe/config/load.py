"""Reads YAML files and overrides into a validated `Config`.

A YAML file may name other files under `extends:`, relative to itself or as `find` finds them. Later
sources override earlier ones: defaults, the extended files in their order, the file, the command
line.

All values in a file are read as text, and the field's type decides what a text means: `1e-3` is a
number in optim.lr and a text in a name. PyYAML's BaseLoader builds no objects and nothing is
interpolated. Tags, anchors, aliases and repeated keys are errors.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, __version__

from scmoe.config.fields import Config
from scmoe.config.installation import refuse_old_omegaconf, scmoe
from scmoe.config.leaves import ConfigError, leaves, show, show_typed
from scmoe.config.registry import import_extensions, named, refuse_kept
from scmoe.config.rules import validate
from scmoe.config.untyped import NULL, Quoted, guessed

refuse_old_omegaconf(__version__)

# In a checkout this is a link, in an installed package a folder.
SHIPPED = Path(__file__).parents[1] / "configs"
_LEAVES = {leaf.key: leaf for leaf in leaves(Config())}
_SECTIONS = {key.rpartition(".")[0] for key in _LEAVES if "." in key}
_MAPPINGS = tuple(f"{leaf.key}." for leaf in _LEAVES.values() if leaf.type == dict[str, Any])


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration of a YAML file and overrides `key=value` or `--key=value`.

    path: a file or a name that `find` finds; None for the defaults only. Raises ConfigError, in one
    line, for a file that cannot be read, an unknown key, a value of another type or range, and a
    combination that cannot run.
    """
    tree = copy.deepcopy(_defaults())
    if path is not None:
        _merge_file(tree, find(path))
    return _finished(tree, overrides, "" if path is None else str(path))


def read_unchecked(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return what `load_config` returns, but combinations of values are not checked: it may not
    run."""
    tree = copy.deepcopy(_defaults())
    _merge_file(tree, find(path))
    return _merged(tree, overrides)


def keys_of_file(path: str | Path) -> frozenset[str]:
    """Return the dotted keys that a file sets, or one that it extends."""
    return frozenset(key for mapping, _ in _mappings(find(path)) for key, _ in _pairs(mapping))


def keys_of(overrides: Sequence[str]) -> frozenset[str]:
    """Return the dotted keys that overrides set, each key of a section's mapping."""
    return frozenset(key for word in overrides for key, _ in _pairs(_mapping_of_override(word)))


def sets(override: str, key: str) -> bool:
    """Return whether an override sets a key, or replaces a mapping that holds it."""
    return any(f"{key}.".startswith(f"{name}.") for name in keys_of([override]))


def load_text(text: str, source: str, overrides: Sequence[str] = (), trains: bool = True) -> Config:
    """Return the validated configuration of a kept text and overrides.

    The text is of `to_yaml`, in a run, a checkpoint or an export.

    A kept configuration runs no code: its callbacks are left out. Its extensions are refused unless
    an override names them or they are imported already (registry.py). source: its name in messages.
    trains: as `validate` takes it.
    """
    tree = copy.deepcopy(_defaults())
    _merge(tree, mapping_of(parse_yaml(text, source), source), source)
    OmegaConf.update(tree, "callbacks", {}, merge=False)
    if not named(overrides):
        refuse_kept(tree.extensions, source)
    return _finished(tree, overrides, source, trains)


def load_kept(path: Path, overrides: Sequence[str] = (), trains: bool = True) -> Config:
    return load_text(read_text(path), str(path), overrides, trains)


def _finished(
    tree: DictConfig, overrides: Sequence[str], source: str, trains: bool = True
) -> Config:
    """Merge the overrides into the tree and validate it.

    source: where its values are from; "" for the defaults.
    """
    config = _merged(tree, overrides)
    if overrides:
        source = f"{source} and command line" if source else "command line"
    validate(config, source or "defaults", trains)
    return config


def _merged(tree: DictConfig, overrides: Sequence[str]) -> Config:
    """Return the tree with the overrides in it."""
    for override in overrides:
        _merge(tree, _mapping_of_override(override), "command line")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    import_extensions(config.extensions)
    return config


def _mapping_of_override(override: str) -> dict[str, Any]:
    key, equals, text = override.removeprefix("--").partition("=")
    if not equals:
        raise ConfigError(
            f"command line: {override!r} has no value. Write key=value or --key=value."
        )
    value = parse_yaml(text, f"command line: {key}")
    if "#" in text and (comment := _comment_in(text)):
        raise ConfigError(
            f"command line: {key} ends with {show(comment)}, which YAML reads as a comment. If"
            f" it belongs to the value, write {key}='\"...\"'."
        )
    return {key: value}


@cache
def _defaults() -> DictConfig:
    """Return the defaults as a tree that can be changed.

    It is cached, because a copy takes a quarter of the time of a new one.
    """
    tree = OmegaConf.structured(Config)
    for section in _SECTIONS:  # OmegaConf makes a frozen dataclass read-only
        OmegaConf.set_readonly(OmegaConf.select(tree, section), False)
    OmegaConf.set_readonly(tree, False)
    return tree


def _merge_file(tree: DictConfig, path: Path) -> None:
    for mapping, source in _mappings(path):
        _merge(tree, mapping, source)


def _mappings(path: Path, children: tuple[Path, ...] = ()) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield what the files that a file extends say, then what it says itself, each with its name.

    children: the chain of files that extend it.
    """
    text = read_text(path, f", which {children[-1]} extends" if children else "")
    identity = path.resolve()
    if identity in children:
        raise ConfigError(f"{path}: extends itself: {' > '.join(map(str, (*children, identity)))}")
    parsed = parse_yaml(text, str(path))
    # such a file was cut off, or is not saved yet: {} says that the defaults are meant
    if parsed == "":
        raise ConfigError(
            f"{path}: the file is empty. Write at least one key, or {{}} for the defaults."
        )
    mapping = mapping_of(parsed, str(path))
    extends = mapping.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not (isinstance(parents, list) and all(isinstance(parent, str) for parent in parents)):
        raise ConfigError(f"{path}: extends is {show(extends)}. Give a path or a list of paths.")
    for parent in parents:
        yield from _mappings(find(parent, path.parent), (*children, identity))
    yield mapping, str(path)


def mapping_of(value: Any, source: str) -> dict[str, Any]:
    """Return what is parsed of a file. ConfigError: it is no mapping. The message has nothing of
    the file, which may be one that others must not see."""
    if not isinstance(value, dict):
        form = "a list" if isinstance(value, list) else "a text"
        raise ConfigError(
            f"{source}: the file holds {form}. It must be a mapping of keys to values, such as a"
            " line `name: mine`."
        )
    return value


def read_text(path: Path, extended: str = "") -> str:
    """Return the text of a configuration. extended: who extends it, for the error message."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = f"{_similar_name(path)}; {scmoe('list')} shows all names"
        raise ConfigError(f"{path}{extended}: cannot be read: {error}{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a null byte
        raise ConfigError(f"{path}{extended}: cannot be read: {error}") from error


def _similar_name(path: Path) -> str:
    """Return a question that suggests a configuration of a similar name; "" if there is none."""
    paths = [name.removeprefix("configs/").removesuffix(".yaml") for name in shipped_and_own()]
    names = {Path(name).stem: name for name in paths}
    near = get_close_matches(path.stem, names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def _merge(tree: DictConfig, mapping: dict[str, Any], source: str) -> None:
    seen: set[str] = set()
    for key, value in _pairs(mapping):
        if key in seen:  # once in a section and once as a dotted key
            raise ConfigError(f"{source}: {key} comes twice")
        seen.add(key)
        if (key, value) == ("schedule", "auto"):
            key, value = "schedule.auto", "true"
        in_mapping = key.startswith(_MAPPINGS)
        if not in_mapping and key not in _LEAVES and key not in _SECTIONS:
            raise ConfigError(f"{source}: unknown key {show(key)}, {_hint(key)}")
        try:
            typed = _untyped(value) if in_mapping else _typed(key, value)
            OmegaConf.update(tree, key, typed, merge=False, force_add=in_mapping)
        except ValueError as error:  # OmegaConf's ValidationError is one
            hint = "; no interpolation" if "${" in str(value) else ""
            raise ConfigError(
                f"{source}: {key} is {show_typed(value)}, allowed: {_allowed(key)}{hint}"
            ) from error


def _allowed(key: str) -> str:
    """Return the values of a key, for error messages."""
    if key in _SECTIONS:
        return f"{'auto or ' if key == 'schedule' else ''}a mapping of keys to values"
    if key.startswith(_MAPPINGS):
        return "plain values and lists"
    leaf = _LEAVES[key]
    return "a text that is not empty" if leaf.type is str and leaf.names is None else leaf.allowed


def _typed(key: str, value: Any) -> Any:
    """Return a text, or a list of texts, as OmegaConf takes it for a field.

    Raises ValueError if the field has no such value.
    """
    if key in _SECTIONS:
        raise ValueError
    leaf = _LEAVES[key]
    if leaf.type == dict[str, Any] and value == {}:  # one with entries comes entry by entry
        return {}
    if isinstance(value, list) and leaf.type in (list[str], list[int]):
        return [str(_text(each)) for each in value]
    text = str(_text(value))
    if leaf.type == dict[str, Any] or (leaf.type is bool and text.lower() not in ("true", "false")):
        raise ValueError  # OmegaConf reads any number as true
    choices = {str(choice): choice for choice in leaf.choices}
    return None if text in NULL else choices.get(text, text)


def _untyped(value: Any) -> Any:
    """Return a value of a mapping whose entries have no type here. Raises ValueError as `_text`."""
    if isinstance(value, list):
        return [_untyped(each) for each in value]
    return {} if value == {} else guessed(_text(value))  # {}: a callback without options


def _text(value: Any) -> str:
    """Return a text of YAML.

    Raises ValueError for another value, and for OmegaConf's signs for interpolation and a missing
    value.
    """
    if not isinstance(value, str) or "${" in value or value == "???":
        raise ValueError
    return value


def _comment_in(text: str) -> str:
    """Return what YAML leaves out at the end of a value, from # on."""
    tokens = [token for token in yaml.scan(text) if token.end_mark.index > token.start_mark.index]
    return text[tokens[-1].end_mark.index if tokens else 0 :].strip()


def _pairs(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values; none for an empty section."""
    for key, value in mapping.items():
        if isinstance(value, dict) and (value or prefix + key in _SECTIONS):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _hint(key: str) -> str:
    """Suggest the known key that was likely meant.

    It is the field of this name or of the most similar one.
    """
    by_name = {known.rpartition(".")[2]: known for known in reversed(_LEAVES)}
    near = get_close_matches(key.rpartition(".")[2], by_name, 1)
    return f"did you mean {by_name[near[0]]}?" if near else "see --help for all keys"


class _Loader(yaml.BaseLoader):
    """Reads mappings, lists and texts, and nothing else."""

    def fetch_tag(self) -> None:  # the scanner calls it at the first sign of a tag
        raise ConfigError(
            f"line {self.get_mark().line + 1}: tags (!), anchors (&) and aliases (*) are not"
            " allowed."
        )

    fetch_anchor = fetch_alias = fetch_tag

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text: str = super().construct_scalar(node)
        return Quoted(text) if node.style else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping = super().construct_mapping(node, deep)
        names = [key.value for key, _ in node.value]
        if len(mapping) < len(names):
            twice = next(key for key, _ in reversed(node.value) if names.count(key.value) > 1)
            raise yaml.constructor.ConstructorError(
                problem=f"{twice.value} comes twice", problem_mark=twice.start_mark
            )
        return mapping


def parse_yaml(text: str, source: str) -> Any:
    """Return the mappings, lists and texts of a YAML text; "" if it is empty. A text in quotes is a
    `Quoted`.

    source: the file or "command line", for error messages. Raises ConfigError for other YAML.
    """
    try:
        value = yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: {what_is_bad(error)}") from error
    return "" if value is None else value


def what_is_bad(error: yaml.YAMLError | RecursionError) -> str:
    """Return where a text is no YAML, and why, without the line itself."""
    if isinstance(error, yaml.MarkedYAMLError):
        return f"line {error.problem_mark.line + 1}: bad YAML: {error.problem}"
    return f"bad YAML: {error}"  # forbidden characters; nesting that is too deep


def find(name: str | Path, folder: Path = Path()) -> Path:
    """Return the file of a configuration.

    It is looked for in a folder (the current one), then among those that come with scmoe.
    name: quickstart, quickstart.yaml, configs/quickstart.yaml, experiment/table3/small, or a preset
    of configs/model such as longcat_flash. If there is no such file, return folder / name, so that
    reading it is the error.
    """
    name = str(name)
    shipped = SHIPPED / name.removeprefix("configs/")
    presets = () if "/" in name else (folder / "configs/model" / name, SHIPPED / "model" / name)
    for path in (folder / name, folder / "configs" / name, shipped, *presets):
        for file in (str(path), f"{path}.yaml"):
            if os.path.isfile(file):  # no error for a name that no file can have
                return Path(file)
    return folder / name


def shipped_and_own() -> dict[str, Path]:
    """Return all configurations that `find` finds by name from the current folder.

    They are by name: configs/quickstart.yaml, ...
    """
    roots = (SHIPPED, Path("configs"))
    files = {
        f"configs/{file.relative_to(root)}": file
        for root in roots
        for file in root.rglob("*.yaml")
        if file.is_file()
    }
    return dict(sorted(files.items()))
