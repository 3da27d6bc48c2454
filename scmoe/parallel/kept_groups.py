"""Lets the trainings of one process use the same process groups.

torch keeps a group until it is destroyed, and each group of gloo has three threads. Groups cannot
end with their training: its module still sends rows through them.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from scmoe.parallel.mesh import Mesh

# by the default group, so that they end with it
KEPT: WeakKeyDictionary[Any, dict[tuple[Any, ...], Mesh]] = WeakKeyDictionary()


def with_kept_groups(make: Callable[..., Mesh], *layout: Any) -> Mesh:
    """Return make(*layout), or what an earlier call has made of the same layout.

    Every rank of the default group must call it.
    """
    meshes = KEPT.setdefault(dist.group.WORLD, {})
    key = (make, *layout)
    if key not in meshes or not is_registered(meshes[key].control_group):
        meshes[key] = make(*layout)
    return meshes[key]


def give_up_groups() -> None:
    """Let no later training use the groups of this process.

    After an error, ranks may have begun different collectives in them.
    """
    KEPT.clear()


def is_registered(group: Any) -> bool:
    """Return whether a group has not been destroyed."""
    try:
        dist.get_group_rank(group, dist.get_rank())
    except ValueError:
        return False
    return True
