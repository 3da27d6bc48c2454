"""This module runs ranks that must fail, and returns how they fail."""

from typing import Any

import pytest

from experiments.engine.ranks import GRACE_S, RankError, run_ranks

MODEL = "position=pos2 strategy.ep_size=2"


def failure(fn: Any, world_size: int, *args: Any, all_fail: bool = False) -> str:
    """Return the message of the RankError of ranks that must fail. The message of a rank that
    hangs is different.

    all_fail: every rank does, at the same time; on a busy machine the last one may be seconds late
    with its report.
    """
    with pytest.raises(RankError) as caught:
        run_ranks(fn, world_size, *args, timeout_s=60, grace_s=30 if all_fail else GRACE_S)
    return str(caught.value)
