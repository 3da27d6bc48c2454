"""Writes a configuration as YAML: every field, or only those that are not at their defaults."""

from dataclasses import asdict
from typing import Any

import yaml

from scmoe.config.fields import Config
from scmoe.config.leaves import flatten, leaves


def to_yaml(config: Config) -> str:
    """Return every field as YAML; `load_config` reads an equal Config from it."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


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
    return yaml.safe_dump(changed, sort_keys=False) if changed else ""
