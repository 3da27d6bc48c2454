"""Makes Markdown of this project's docstrings, for the pages of the Python reference.

A line such as `ep_size: number of ranks; None: all.` becomes an item of a list, and `<` stays what
it is.
"""

import re
from collections.abc import Sequence

from griffe import Extension, Object

ITEM = re.compile(r"(?:\w+, )*\w+: ")  # what a parameter's line begins with


class PlainDocstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        if obj.docstring:
            parameters = [each.name for each in getattr(obj, "parameters", ())]
            obj.docstring.value = markdown(obj.docstring.value, parameters)


def markdown(docstring: str, parameters: Sequence[str] = ()) -> str:
    """Return a docstring with its lines of parameters as a list. Indented blocks, which are
    drawings, stay."""
    if parameters:  # several may stand in one line
        docstring = re.sub(rf"(?<=[.;]) (?=(?:{'|'.join(parameters)}): )", "\n", docstring)
    lines: list[str] = []
    for line in docstring.splitlines():
        drawing = line.startswith("    ")
        if not drawing and ITEM.match(line):
            name, _, text = line.partition(": ")
            line = f"- `{name}`: {text}"
            if lines and lines[-1] and not lines[-1].startswith(("- ", "  ")):
                lines.append("")
        elif line.startswith(("Raises ", "Returns ")) and lines and lines[-1]:
            lines.append("")
        elif (
            not drawing
            and line
            and lines
            and lines[-1].startswith(("- ", "  "))
            and not lines[-1].startswith("    ")
        ):
            line = f"  {line}"
        lines.append(line if drawing else line.replace("<", "&lt;"))
    return "\n".join(lines)
