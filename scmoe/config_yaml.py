"""YAML as mappings, lists and texts, and nothing else.

PyYAML's BaseLoader builds no other object and guesses no types. On top of it, what a configuration has no use for and
PyYAML would let pass is an error: tags, anchors and aliases, and a key that comes twice.
"""

from __future__ import annotations

from typing import Any

import yaml

from scmoe.config_check import ConfigError


class _Loader(yaml.BaseLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        mapping = super().construct_mapping(node, deep)
        names = [key.value for key, _ in node.value]
        if len(mapping) < len(names):
            twice = next(key for key, _ in reversed(node.value) if names.count(key.value) > 1)
            raise yaml.constructor.ConstructorError(problem=f"{twice.value} comes twice", problem_mark=twice.start_mark)
        return mapping


def parse_yaml(text: str, source: str) -> Any:
    """Mappings, lists and texts of a YAML text; "" if it is empty.

    source: the file or "command line", for the message.
    Raises ConfigError.
    """
    try:
        for token in yaml.scan(text):
            if isinstance(token, (yaml.TagToken, yaml.AnchorToken, yaml.AliasToken)):
                line = token.start_mark.line + 1
                raise ConfigError(f"{source}: line {line}: a tag (!), anchor (&) or alias (*), allowed: plain YAML")
        value = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{source}: line {error.problem_mark.line + 1}: bad YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:  # characters that YAML forbids; nesting without end
        raise ConfigError(f"{source}: bad YAML: {error}") from error
    return "" if value is None else value
