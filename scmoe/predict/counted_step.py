"""A training step of rank 0 of a job of any size, counted in one process: tensors have shapes and
dtypes, but no numbers.

Tensors are fake (torch's FakeTensorMode), and so is the process group: a collective takes its
tensors and returns. The step is the library's own: forward, backward with DDP and the experts'
reducer or with FSDP2, the global gradient norm, the step of the optimizer, whose moments exist from
the start. What operators do is counted from their calls alone, without hooks. torch's own trackers,
MemTracker and FlopCounterMode, put hooks on every module. These hooks hold gradients of outputs,
and what activation checkpointing computes again, longer than autograd does
(docs/decisions/0037-dry-run.md).

Tensors are on the CPU, where torch needs no GPU; experts and RMSNorm run as on a GPU if the job is
one of GPUs. Left out: time, streams, the allocator's gaps, Lightning's loop, the
guard's sums, what autocast does on a GPU alone.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from scmoe.blocks.sublayers import recompute_activations
from scmoe.moe import experts
from scmoe.parallel.dense.memory import RankJob
from scmoe.parallel.dense.sharded import bytes_of, materialise, shard, with_dense_mesh
from scmoe.parallel.mesh import Mesh, build_mesh, expert_parameters
from scmoe.parallel.update.guard import clip_grad_norm
from scmoe.parallel.update.wrap import wrap
from scmoe.parallel.wire.wire import Wire
from scmoe.planning.clock import CPU

TIMEOUT = timedelta(seconds=60)
DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
COLLECTIVES = {  # by the operator that torch calls
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
}


@dataclass(frozen=True)
class CountedStep:
    """Bytes of rank 0, FLOPs of its batch, bytes of each collective in a step.

    weights, gradients, optimizer: totals. peak: bytes at the moment of peak memory, by the phase
    that allocated them: `gradients` are DDP's buckets; the experts' gradients are allocated in
    `backward`.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: dict[str, int]
    flops: int
    collectives: dict[str, int]


Build = Callable[[Wire], Any]  # makes a LightningModule, its model on the meta device


def count_step(
    job: RankJob, build: Build, make_batch: Callable[[], Mapping[str, Tensor]], clip: float | None
) -> CountedStep:
    """Run one step of rank 0 of a job. clip: the gradient norm. make_batch: of this rank."""
    with fake_ranks(job.ranks, job.ep_size) as mesh, ExitStack() as inside:
        if job.dense != "replicated":
            mesh = with_dense_mesh(mesh, job.dense, job.node_size, CPU, TIMEOUT)
        wire = Wire(mesh)
        module = build(wire)
        module.model.to(DTYPES.get(job.precision, torch.float32))
        module.wire = wire
        inside.enter_context(without_numbers(job.on_gpu))
        return step(job, module, make_batch, clip)


def step(
    job: RankJob, module: Any, make_batch: Callable[[], Mapping[str, Tensor]], clip: float | None
) -> CountedStep:
    """Run one step of a module whose model is on the meta device, and count, `without_numbers`."""
    model, mesh = module.model, module.wire.mesh
    split = mesh.dense_mesh is not None
    if split:
        shard(model, mesh, job.precision)
    give_storages(model)
    if job.recompute:
        recompute_activations(model)
    optimizer = module.configure_optimizers()["optimizer"]
    module.log, module.optimizers = lambda *_, **__: None, lambda: optimizer  # they ask the Trainer
    parameters, shards = list(model.parameters()), {p for _, p in expert_parameters(model)}
    for p in parameters:  # so that the moments are there before the step
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    batch = make_batch()

    counts = StepCounts()
    counts.add([*parameters, *model.buffers()])
    counts.phase = "optimizer"
    counts.add(value for state in optimizer.state.values() for value in state.values())
    counts.phase = "batch"
    counts.add(batch.values())
    with Counting(counts.note), counts.resizing():
        if not split and mesh.world_size > 1:
            counts.phase = "gradients"
            module.model = wrap(model, mesh, init_sync=False).module
            module.model.register_comm_hook(None, reduce)
        counts.phase = "forward"
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bf16-mixed"):
            loss = module.training_step(batch, 0)["loss"]
        counts.phase = "backward"
        (loss / mesh.world_size if split else loss).backward()
        del loss
        counts.phase = "update"
        clip_grad_norm(parameters, shards, clip, mesh)
        optimizer.step()
    return CountedStep(
        weights=bytes_of(parameters),
        gradients=bytes_of(p.grad for p in parameters),
        optimizer=bytes_of(value for state in optimizer.state.values() for value in state.values()),
        peak=dict(counts.peak),
        flops=counts.flops,
        collectives=dict(counts.collectives),
    )


@contextmanager
def fake_ranks(world_size: int, ep_size: int) -> Iterator[Mesh]:
    """Give the place of rank 0 among ranks that do not exist. All groups are there, and send
    nothing."""
    new_group = dist.new_group

    def new_fake_group(*args: Any, **options: Any) -> Any:
        options["backend"] = "fake"
        return new_group(*args, **options)

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with patch.object(dist, "new_group", new_fake_group):  # gloo's would look for the others
            mesh = build_mesh(ep_size, CPU, TIMEOUT)
        yield mesh if world_size > 1 else Mesh()
    finally:
        dist.destroy_process_group()


@contextmanager
def without_numbers(on_gpu: bool) -> Iterator[None]:
    """Run a model on fake tensors. on_gpu: experts and RMSNorm take their ways on a GPU."""
    with ExitStack() as inside:
        inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # those on meta
        if on_gpu:
            inside.enter_context(patch.object(experts, "choose_mlps", choose_mlps_on_gpu))
            inside.enter_context(patch.object(nn.functional, "rms_norm", rms_norm_on_gpu))
        yield


def give_storages(model: nn.Module) -> None:
    """Give a model on the meta device fake tensors on the host."""
    materialise(model, CPU)
    for owner in model.modules():
        for name, buffer in [*owner.named_buffers(recurse=False)]:
            setattr(owner, name, torch.empty_like(buffer, device=CPU))


def reduce(_: Any, bucket: dist.GradBucket) -> Future[Tensor]:
    """Sum a bucket as DDP does without a hook, where the future has no result in a fake group."""
    dist.all_reduce(bucket.buffer())
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done


def choose_mlps_on_gpu(_: Tensor, counts_e: Tensor | None) -> experts.MLPs:
    return experts.batched_mlps if counts_e is None else experts.grouped_mlps


def rms_norm_on_gpu(x: Tensor, shape: Any, weight: Tensor, eps: float | None) -> Tensor:
    """Return RMSNorm as a GPU computes it: in one kernel, if the dtypes are equal."""
    if x.dtype == weight.dtype:
        return OneKernel.apply(x, weight)
    return torch.rms_norm(x, shape, weight, eps)


class OneKernel(Function):
    """Replaces RMSNorm by one operator without numbers, which keeps as many bytes for backward as a
    GPU's kernel. On the host RMSNorm is several operators, which keep more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, _):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Call(NamedTuple):
    """A call of an operator of torch."""

    operator: Any
    args: Any
    kwargs: Any
    out: Any

    @property
    def flops(self) -> int:
        return flops_of(self.operator.overloadpacket, self.args, self.kwargs, self.out)


class Counting(TorchDispatchMode):
    """Hands every call to `note` while it is entered, in a FakeTensorMode."""

    def __init__(self, note: Callable[[Call], None]) -> None:
        super().__init__()
        self.note = note
        self.fake = active_fake_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls again, with this rank's parts
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if active_fake_mode() is self.fake:  # else DTensor asks for a shape
            self.note(Call(func, args, kwargs, out))
        return out


class StepCounts:
    """What a step's calls do. A storage counts from the operator that makes it until nothing refers
    to it.

    live: bytes by the phase in which their storage was made. peak: `live` when its sum was largest.
    flops: of products and attention. collectives: bytes by operator and group, `sent_bytes` of each
    call.
    """

    def __init__(self) -> None:
        self.phase = "weights"
        self.live = Counter[str]()
        self.peak = Counter[str]()
        self.collectives = Counter[str]()
        self.flops = 0
        self.sizes: dict[int, tuple[str, int]] = {}  # phase and bytes of each storage

    def note(self, call: Call) -> None:
        self.add(tensors_in([call.out]))
        self.flops += call.flops
        if call.operator.namespace == "c10d":
            name, size = sent_bytes(call.operator, call.args)
            self.collectives[name] += size

    def add(self, tensors: Iterable[Any]) -> None:
        """Count, in the current phase, the storages that are not counted yet."""
        for tensor in tensors:
            storage = (
                tensor.to_local() if isinstance(tensor, DTensor) else tensor
            ).untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = self.phase, 0
                self._resize(key, storage.nbytes())
                weakref.finalize(storage, self._resize, key, None)

    def _resize(self, key: int, size: int | None) -> None:
        """Note that a storage has so many bytes; None: it was freed."""
        phase, before = self.sizes.pop(key)
        self.live[phase] += (size or 0) - before
        if size is not None:
            self.sizes[key] = phase, size
            if self.live.total() > self.peak.total():
                self.peak = self.live.copy()

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Count storages that FSDP empties and fills again with their new size, which operators do
        not show."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            if storage._cdata in self.sizes:
                self._resize(storage._cdata, storage.nbytes())
            return resized

        with patch.object(torch.UntypedStorage, "resize_", counted):
            yield


def flops_of(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return FLOPs of products and attention. torch does not count attention of the CPU; its
    backward has twice those of forward, as for every product: the scores that a kernel computes
    again are not counted."""
    aten = torch.ops.aten
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * sdpa_flop_count(*(t.shape for t in args[1:4]))
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def sent_bytes(func: Any, args: Any) -> tuple[str, int]:
    """Return a collective's name and group, and the bytes that a rank sends in it, its own share
    included.

    An all-reduce is a reduce-scatter and an all-gather, so it sends its tensor twice. The others
    send the larger of what goes in and what comes out."""
    name = func.name().partition("::")[2].partition(".")[0]
    group = next(
        dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
    )
    sizes = [sum(t.nbytes for t in tensors_in([arg])) for arg in args]
    who = "all" if group.group_desc == "default_pg" else group.group_desc
    return f"{COLLECTIVES[name]} {who}", (1 + (name == "allreduce_")) * max(sizes)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
