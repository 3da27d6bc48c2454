"""The imports of most parts, for the server from which isolated.py forks their processes."""

from contextlib import suppress
from importlib import import_module

from experiments.engine.ranks import PRELOADED

for name in PRELOADED:
    with suppress(Exception):  # a part that needs it raises the same error, where it is reported
        import_module(name)
