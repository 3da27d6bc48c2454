"""A process of tests imports this module last.

The garbage collector begins, but never looks at what was imported. It would do so hundreds of
times: a fifth of the time of short tests.

Lightning asks for the entry points of its callbacks at each Trainer, which reads a file of every
installed package: a twentieth of a short training. Packages do not change during the tests, so they
are read once in a process. The defaults of a configuration are made once too, for all ranks.
"""

import gc
from functools import cache

from lightning.fabric.utilities import registry

from scmoe.config.load import load_config

registry.entry_points = cache(registry.entry_points)
load_config()
gc.freeze()
gc.enable()
