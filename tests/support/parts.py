"""This module builds a model in parts, on one of several ranks, and compares it with the model of
one process.

It counts the bytes of storages on the host while the model is built. Results are plain, so that
ranks can return them.
"""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scmoe.config.fields import Config
from scmoe.moe.experts import Experts
from scmoe.parallel.dense.fsdp_units import units
from scmoe.parallel.dense.sharded import local, put, with_dense_mesh
from scmoe.parallel.mesh import build_mesh
from scmoe.parallel.wire.wire import Wire
from scmoe.predict.counted_step import Counting, StepCounts
from scmoe.training.assembly.model import build_model_to_train


class Built(NamedTuple):
    """peak, part, block, whole: bytes while it was built, of what this rank keeps, of the largest
    block, of the model.

    other: tensors of which this rank's part is not that of one process."""

    peak: int
    part: int
    block: int
    whole: int
    other: list[str]

    def check(self) -> None:
        assert self.other == []
        assert self.part <= self.peak <= self.part + self.block < self.whole, self


class OnHost(StepCounts):
    """Leaves out the meta device."""

    def add(self, tensors: Iterable[Any]) -> None:
        super().add(t for t in tensors if not t.is_meta)


def split_wire(ep_size: int) -> Wire:
    """Return this rank's wire, with dense weights split over all ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    device, timeout = torch.device("cpu"), timedelta(seconds=60)
    mesh = build_mesh(ep_size, device, timeout)
    return Wire(with_dense_mesh(mesh, "sharded", mesh.world_size, device, timeout))


@torch.no_grad()
def build_in_parts(config: Config, wire: Wire) -> Built:
    counts = OnHost()
    with Counting(counts.note):
        model = build_model_to_train(config, wire)
    one = build_model_to_train(config)
    expected, other = tensors(one), []
    for name, t in tensors(model).items():
        module, same = model.get_submodule(name.rpartition(".")[0]), torch.empty_like(t)
        ids = module.expert_ids if isinstance(module, Experts) else range(len(t))
        put(same, expected[name][ids.start : ids.stop])
        other += [name] * (not torch.equal(local(same), local(t)))
    block = max(bytes_of(unit.parameters()) for unit in units(one))
    part, whole = bytes_of(tensors(model).values()), bytes_of(expected.values())
    return Built(counts.peak.total(), part, block, whole, other)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def bytes_of(some: Iterable[Tensor]) -> int:
    return sum(local(t).nbytes for t in some)
