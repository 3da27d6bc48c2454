"""Checks what a configuration takes from extensions (extensions.py), after they are imported.

Which fields an extension's architecture, model, data set or optimizer reads is its own: rules.py says nothing of them.
What measures or moves the parts of scmoe's own architectures is refused with another one.
"""

import inspect
from collections.abc import Iterator

from scmoe.config.fields import Config
from scmoe.config.leaves import Rule
from scmoe.config.registry import ARCHITECTURES, CALLBACKS


def extension_rules(config: Config) -> Iterator[Rule]:
    """Yield what `validate` checks of extensions."""
    names = CALLBACKS.names()
    known = " | ".join(names) or "{}, as no callback is registered; name its module in extensions"
    for name, options in config.callbacks.items():
        yield name not in names, "callbacks", known
        yield not isinstance(options, dict), "callbacks", f"options of {name} by name, or {{}}"
        try:
            inspect.signature(CALLBACKS[name]).bind(**options)
        except TypeError as error:
            yield True, "callbacks", f"options that {name} has: {error}"
    yield config.options and not config.extensions, "options", "{}, as only extensions read it"
    if config.moe.architecture in ARCHITECTURES.built_in:
        return
    analysis, why = config.analysis, f"as moe.architecture={config.moe.architecture} is an extension's"
    yield config.schedule.auto, "schedule.auto", f"false, {why}, which the planner cannot price"
    yield config.offload.way != "resident", "offload.way", f"resident, {why}, whose gates are not known"
    yield analysis.gating_every is not None, "analysis.gating_every", f"null, {why}, whose gates are not known"
    yield analysis.similarity_every is not None, "analysis.similarity_every", f"null, {why}, whose taps are not known"
