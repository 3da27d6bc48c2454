"""`import scmoe.lightning` makes `Trainer(strategy="expert_parallel")` known to Lightning."""

from lightning.pytorch.strategies import StrategyRegistry

from scmoe.lightning.strategy import ExpertParallelStrategy

StrategyRegistry.register(
    "expert_parallel",
    ExpertParallelStrategy,
    "DDP for dense weights, expert parallelism for experts",
    override=True,
)
