"""scmoe: shortcut-connected mixture of experts on PyTorch Lightning.

`import scmoe` changes nothing outside of this package, and imports neither Lightning nor torch: the
names of `__all__` are imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the table PUBLIC, for type checkers and editors
    from scmoe.api import MoE, ScMoEBlock, data_parallel, load_balance_loss, move_biases
    from scmoe.config.load import load_config
    from scmoe.inference.generate import Passes, generate, stream
    from scmoe.inference.sampling import Sampling, Stopping
    from scmoe.lightning.strategy import ExpertParallelStrategy
    from scmoe.moe.router import Scoring
    from scmoe.parallel.checkpoint.loading import load_checkpoint
    from scmoe.parallel.wire.wire import Wire
    from scmoe.runs.seen import train
    from scmoe.runs.trained import load_trained as load
    from scmoe.training.assembly.blocks import register_architecture, register_router
    from scmoe.training.assembly.data import register_dataset
    from scmoe.training.assembly.model import build_model, register_family, register_optimizer
    from scmoe.training.assembly.trainer import register_callback

__version__ = "0.2.0"
__all__ = [
    "ExpertParallelStrategy",
    "MoE",
    "Passes",
    "Sampling",
    "ScMoEBlock",
    "Scoring",
    "Stopping",
    "Wire",
    "build_model",
    "data_parallel",
    "generate",
    "load",
    "load_balance_loss",
    "load_checkpoint",
    "load_config",
    "move_biases",
    "register_architecture",
    "register_callback",
    "register_dataset",
    "register_family",
    "register_optimizer",
    "register_router",
    "stream",
    "train",
]
PUBLIC = {  # name: module and the name there
    "MoE": ("scmoe.api", "MoE"),
    "ScMoEBlock": ("scmoe.api", "ScMoEBlock"),
    "data_parallel": ("scmoe.api", "data_parallel"),
    "load_balance_loss": ("scmoe.api", "load_balance_loss"),
    "move_biases": ("scmoe.api", "move_biases"),
    "Scoring": ("scmoe.moe.router", "Scoring"),
    "Wire": ("scmoe.parallel.wire.wire", "Wire"),
    "ExpertParallelStrategy": ("scmoe.lightning.strategy", "ExpertParallelStrategy"),
    "load_checkpoint": ("scmoe.parallel.checkpoint.loading", "load_checkpoint"),
    "load_config": ("scmoe.config.load", "load_config"),
    "build_model": ("scmoe.training.assembly.model", "build_model"),
    "register_architecture": ("scmoe.training.assembly.blocks", "register_architecture"),
    "register_callback": ("scmoe.training.assembly.trainer", "register_callback"),
    "register_dataset": ("scmoe.training.assembly.data", "register_dataset"),
    "register_family": ("scmoe.training.assembly.model", "register_family"),
    "register_optimizer": ("scmoe.training.assembly.model", "register_optimizer"),
    "register_router": ("scmoe.training.assembly.blocks", "register_router"),
    "load": ("scmoe.runs.trained", "load_trained"),
    "train": ("scmoe.runs.seen", "train"),
    "generate": ("scmoe.inference.generate", "generate"),
    "stream": ("scmoe.inference.generate", "stream"),
    "Passes": ("scmoe.inference.generate", "Passes"),
    "Sampling": ("scmoe.inference.sampling", "Sampling"),
    "Stopping": ("scmoe.inference.sampling", "Stopping"),
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(
            f"module 'scmoe' has no attribute {name!r}, allowed: {', '.join(__all__)}"
        )
    module, name_there = PUBLIC[name]
    value = getattr(import_module(module), name_there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
