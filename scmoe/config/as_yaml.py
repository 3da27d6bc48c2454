"""Writes a configuration as YAML: every field, or only those that are not at their defaults."""

from dataclasses import asdict
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import flatten, leaves
from scmoe.config.untyped import guessed


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that would be read as a number or null where no field has a type."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if guessed(text) == text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def to_yaml(config: Config) -> str:
    """Return every field as YAML; `load_config` reads an equal Config from it."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False)


def changes_to_yaml(config: Config) -> str:
    """Return the fields that are not at their defaults as YAML; "" if all are."""
    defaults = flatten(Config())
    changed: dict[str, Any] = {}
    for leaf in leaves(config):
        if leaf.value != defaults[leaf.key]:
            *sections, name = leaf.key.split(".")
            mapping = changed
            for section in sections:
                mapping = mapping.setdefault(section, {})
            mapping[name] = leaf.value
    return yaml.dump(changed, Dumper=_Dumper, sort_keys=False) if changed else ""
