"""This module trains on fake tensors of the device `cuda`: they have shapes, dtypes and a device,
but no numbers.

A step is the product's own: Lightning's loop calls training_step, backward, the guarded clipping
and AdamW. It raises where the host would wait for the device, where tensors of two devices meet,
and where dtypes do not fit. It runs in a process of tests/support/fake_cuda.py.
"""

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from scmoe.config.fields import Config
from scmoe.config.load import load_config
from scmoe.parallel.mesh import Mesh, expert_parameters
from scmoe.parallel.update.expert_gradients import ExpertGradientReducer
from scmoe.parallel.update.guard import Guard
from scmoe.parallel.wire.wire import Wire
from scmoe.predict.costs import make_batch
from scmoe.predict.counted_step import tensors_in
from scmoe.training.assembly.model import build_module
from tests.support import broken_steps
from tests.support.architectures import overrides

CUDA = torch.device("cuda", 0)
ALL = (
    *(
        "model.layers=2",
        "moe.num_experts=4",
        "moe.noisy=true",
        "moe.z_loss_coef=0.01",
        "optim.warmup_steps=1",
    ),
    "data.global_batch_size=4",
)
TEXT = (
    *("model.dim=16", "model.heads=2", "model.ffn_dim=24", "model.dropout=0.1"),
    *("data.name=synthetic", "data.vocab_size=64", "data.seq_len=12", "trainer.max_steps=2"),
)
IMAGES = (
    *(
        "model.dim=8",
        "model.heads=1",
        "model.patch_size=2",
        "model.window=2",
        "model.drop_path=0.1",
    ),
    *("data.name=digits", "data.image_size=32", "data.num_classes=5", "trainer.max_steps=1"),
)
FAMILIES = {
    "gpt": TEXT,
    "llama": ("model.family=llama", *TEXT, "model.kv_heads=1"),
    "swin": ("model.family=swin", *IMAGES),
}
aten = torch.ops.aten
# fake tensors multiply any two dtypes, kernels do not
PRODUCTS = {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.convolution,
    aten._grouped_mm,
    aten.mv,
    aten.dot,
}


class DeviceFault(AssertionError):
    """The host would wait for the device, or a kernel would refuse its arguments."""


class StepError(RuntimeError):
    """A step has raised. Its text is the error's traceback, because some errors of torch cannot be
    pickled."""


class Outcome(NamedTuple):
    """What a training did: optimizer steps, numbers read by the guard, transfers started, graphs,
    graph breaks.

    order: name, group and numbers of elements of each collective that sends rows, or sums over
    ranks.
    """

    steps: int
    reads: int
    exchanges: int
    graphs: int
    graph_breaks: int
    order: list[tuple[str, str, int]]


class Watch(TorchDispatchMode):
    """Raises DeviceFault where an operator reads a number of the device, draws with a generator of
    another device, multiplies two dtypes, or, in a step, works on two devices: a copy from one to
    the other waits.

    The guard may read whether the norm is finite, and is answered that it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.in_step = 0, False

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # under another mode torch.compile compiles nothing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self.read(args[0])
        out = func(*args, **kwargs)
        tensors = list(tensors_in((args, tuple(kwargs.values()), out)))
        used, generator = {t.device.type for t in tensors}, kwargs.get("generator")
        if generator is not None:
            used.add(generator.device.type)
        if len(used) > 1 and (self.in_step or generator is not None):
            raise DeviceFault(f"{func} uses {' and '.join(sorted(used))}")
        dtypes = {str(t.dtype) for t in tensors if t.is_floating_point()}
        if func.overloadpacket in PRODUCTS and len(dtypes) > 1:
            raise DeviceFault(f"{func} multiplies {' and '.join(sorted(dtypes))}")
        return out

    def read(self, number: Tensor) -> int:
        if number.device.type == "cpu":
            return 0  # any number will do
        reader = sys._getframe(1)
        while reader.f_code.co_filename.startswith((*torch.__path__, __file__)):
            reader = reader.f_back
        if reader.f_code is not Guard.check.__code__:
            raise DeviceFault("the host reads a number of the device")
        self.reads += 1
        return 1


class OnFakeCuda(SingleDeviceStrategy):
    """Builds the module on the device, of fake tensors, and takes each optimizer step under
    `watch`."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(CUDA, AnyDevice())
        self.mesh, self.fake, self.watch = mesh, FakeTensorMode(), Watch()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with self.fake, self.watch, super().tensor_init_context(empty_init):
            yield

    def model_to_device(self) -> None:
        """Average the experts' gradients, as the library's strategy does. The module was built on
        the device."""
        for module in self.model.modules():
            for held in (module._parameters, module._buffers):
                assert all(tensor is None or tensor.device == CUDA for tensor in held.values()), (
                    module
                )
        if self.mesh.world_size > 1:
            ExpertGradientReducer([p for _, p in expert_parameters(self.model)], self.mesh)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.watch.in_step = True
        with self.fake, self.watch:
            return super().optimizer_step(*args, **kwargs)

    def teardown(self) -> None:
        """Do not move the module back: fake tensors have nothing to move."""


class AnyDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


def batches(config: Config, fake: FakeTensorMode) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the host, one for each step; the second has padding, if it is of text."""
    with fake:
        batch = make_batch(config, config.data.global_batch_size)
        padding = {"padding_mask": batch["input_ids"] == 0} if "input_ids" in batch else {}
    yield batch
    yield batch | padding


@contextmanager
def mesh_of(ranks: int, rank: int) -> Iterator[Mesh]:
    """Give the place of rank 0 or 1 of `ranks`, EP 2, in groups that send nothing."""
    if ranks == 1:
        yield Mesh()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        ep_group, counts_group = (
            dist.new_group([0, 1], group_desc=name) for name in ("ep", "counts")
        )
        edp_group = dist.new_group(range(rank, ranks, 2), group_desc="edp")
        yield Mesh(rank, ranks, 2, None, ep_group, counts_group, edp_group)
    finally:
        dist.destroy_process_group()


@contextmanager
def recorded(name: str, order: list[tuple[str, str, int]]) -> Iterator[None]:
    """Note in `order` each call of a collective, while it is open."""
    real = getattr(dist, name)

    def called(tensor: Tensor, *given: Any, **named: Any) -> Any:
        group = named.get("group")
        order.append((name, "all" if group is None else group.group_desc, tensor.numel()))
        return real(tensor, *given, **named)

    with patch.object(dist, name, called):
        yield


def log(name: str, value: Any, prog_bar: bool = False) -> None:
    """Raise DeviceFault where Lightning would copy a number to the device, or read what the
    progress bar shows."""
    if not isinstance(value, Tensor):
        raise DeviceFault(f"a number of the host is logged: {name}")
    if prog_bar and value.is_cuda:
        raise DeviceFault(f"the progress bar reads a number of the device: {name}")


def attempt(words: str, ranks: int = 1, broken: str | None = None, rank: int = 1) -> Outcome:
    """Do what `train` does. Raise StepError where it raises."""
    try:
        return train(words, ranks, broken, rank)
    except Exception:  # of any kind: an error of torch cannot be pickled, its traceback can
        raise StepError(traceback.format_exc()) from None


def train(words: str, ranks: int = 1, broken: str | None = None, rank: int = 1) -> Outcome:
    """Take the steps of the training that `words` describe, on one rank or as one of several with
    EP 2.

    words: a family, then words of the config. A language model takes two steps, the second with
    padding; swin one. broken: a fault of broken_steps.py, which must make it raise.
    """
    family, *rest = words.split()
    config = load_config(None, [*ALL, *FAMILIES[family], *overrides(" ".join(rest))])
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    # traces as always, and generates no code of the device
    compile = partial(torch.compile, backend="eager")
    fault = broken_steps.FAULTS[broken][0]() if broken else nullcontext()
    order: list[tuple[str, str, int]] = []
    rows, sums = (recorded(name, order) for name in ("all_to_all_single", "all_reduce"))
    with mesh_of(ranks, rank) as mesh, fault, rows, sums, patch.object(torch, "compile", compile):
        module, strategy = build_module(config), OnFakeCuda(mesh)
        module.wire = Wire(mesh)
        module.log = log  # type: ignore[method-assign]  # Lightning's copies need numbers
        mixed = config.trainer.precision == "bf16-mixed"
        plugin = MixedPrecision("bf16-mixed", "cuda") if mixed else Precision()
        trainer = Trainer(
            strategy=strategy,
            plugins=[plugin],
            max_steps=config.trainer.max_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings(action="ignore"):
            trainer.fit(module, batches(config, strategy.fake))
        without = [
            name for name, p in module.named_parameters() if p.grad is None or p.grad.device != CUDA
        ]
        assert not without, f"no gradient on the device: {without}"
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    exchanges = sum(name == "all_to_all_single" for name, *_ in order)
    return Outcome(trainer.global_step, strategy.watch.reads, exchanges, graphs, breaks, order)
