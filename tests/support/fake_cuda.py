"""This module builds the shim of fake_cuda.cpp and starts a process that has loaded it
(docs/tests.md).

The shim must be loaded before torch, so this module does not import torch at its top, and no test
process loads it.
"""

import ctypes
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")


def missing() -> str | None:
    """Return what the shim cannot do without here, or None."""
    return None if compiler() else f"no C++ compiler here: {', '.join(COMPILERS)}"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def build(folder: Path) -> Path:
    """Compile the shim into `folder`, which takes two seconds. Raise CalledProcessError with the
    compiler's words."""
    from torch.utils.cpp_extension import include_paths, library_paths

    chosen, shim = compiler(), folder / "fake_cuda.so"
    assert chosen is not None
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20", *includes, *libraries, "-ltorch_cpu", "-lc10"]
    subprocess.run([chosen, str(SOURCE), "-o", str(shim), *flags], check=True)
    return shim


def process_with(shim: Path) -> ProcessPoolExecutor:
    """Return an executor of one process that has the shim. Its functions are pickled by name: not
    those of a test."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _load, (str(shim),))


def _load(shim: str) -> None:
    """Load the shim. Then patches the functions of torch's Python part that ask the driver what
    the device can do."""
    assert "torch" not in sys.modules, "torch has asked for the device already"
    gc.disable()  # a process of some forty short trainings, whose tensors have no numbers
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a build with CUDA would use a real device
    library = ctypes.CDLL(shim)
    import torch
    import torch.backends.cuda as kernels
    import torch.cuda.amp.common as amp

    library.register_device()
    torch.set_num_threads(1)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    amp.amp_definitely_not_available = lambda: False
    for use in (
        kernels.enable_flash_sdp,
        kernels.enable_mem_efficient_sdp,
        kernels.enable_cudnn_sdp,
    ):
        use(False)  # which of them suits the device, a build with CUDA would ask its driver
