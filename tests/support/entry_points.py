"""This module makes Lightning read the entry points of its callbacks once in a process.

It asks for them at each Trainer, which reads a file of every installed package: a twentieth of a
short training. Packages do not change during the tests.
"""

from functools import cache

from lightning.fabric.utilities import registry

registry.entry_points = cache(registry.entry_points)
