"""One thread per process: tests run beside each other, and sums are in the same order everywhere."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("scmoe", deadline=None)  # the machine is shared: a slow example is no fault
settings.load_profile("scmoe")
