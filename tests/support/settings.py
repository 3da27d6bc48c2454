"""What holds in each process of tests: one thread, what ranks import, and how hypothesis draws."""

import torch
from hypothesis import settings

from experiments.engine.ranks import PRELOADED

# Tests import these in ranks. Each would take a tenth of a second there, or more.
PRELOADED[:] = [
    "tests.support.begin_imports",
    *PRELOADED,
    "scmoe.training.run.train",
    "scmoe.cli.train",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "pytest",
    "tests.support.commands",
    "tests.support.resuming",
    "tests.support.end_imports",
]
torch.set_num_threads(1)
# the machine is shared: a slow example is not a failure
settings.register_profile("scmoe", deadline=None, max_examples=50)
settings.load_profile("scmoe")
