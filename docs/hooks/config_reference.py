"""Write the page of all configuration fields, from the dataclasses of scmoe/config/."""

from html import escape
from itertools import groupby

from scmoe.config.fields import Config
from scmoe.config.leaves import Leaf, leaves, show

TITLE = """# Configuration fields

Every field with its type, default, range and meaning. The page is made from
`scmoe/config/fields.py` when the site is built; `scmoe train --help` prints the same.
[Configuration](../configuration.md) says how to write a file, and how values of the command line,
of a file and of what it extends come together. Values must also fit together: a value that does not
is refused in one line, before anything starts.
"""
SECTIONS = {  # what a section is about; a section without an entry has its name only
    "": "The experiment",
    "model": "The backbone",
    "moe": "The mixture of experts",
    "schedule": "When the experts run",
    "data": "Data",
    "optim": "Optimizer",
    "trainer": "The training",
    "strategy": "Ranks",
    "offload": "Experts off the device",
    "analysis": "What is measured beside the training",
    "logger": "Loggers",
}


def page() -> str:
    """Return the page in Markdown: a table for each section, a row for each field."""
    text = TITLE
    for section, fields in groupby(leaves(Config()), key=lambda leaf: leaf.key.rpartition(".")[0]):
        about = SECTIONS.get(section, "")
        heading = f"`{section}`: {about}".removesuffix(": ") if section else about
        text += (
            f"\n## {heading}\n\n| field | type | range | default | meaning |\n| --- | --- | --- |"
            " --- | --- |\n"
        )
        text += "".join(map(row, fields))
    return text


def row(leaf: Leaf) -> str:
    """Return a field's row of the table; `#moe.position` of the page leads to it."""
    default = (
        str(leaf.value).lower() if isinstance(leaf.value, bool) else show(leaf.value).strip("'")
    )
    kind = leaf._replace(range=None).allowed
    meaning = escape(leaf.help, quote=False).replace("|", "\\|")
    return (
        f"| `{leaf.key}`{{ #{leaf.key} }} | `{kind}` | {leaf.range or ''} | `{default}` |"
        f" {meaning} |\n"
    )
