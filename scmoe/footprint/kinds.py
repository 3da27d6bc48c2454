"""Names the part of a model that each parameter belongs to: experts, gates, attention, and so on."""

from collections.abc import Iterator

from torch import nn

from scmoe.blocks.sublayers import MLP, Attention
from scmoe.moe.coefficient import CG1, CG2
from scmoe.moe.experts import Experts
from scmoe.moe.router import Router

KINDS: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    nn.LayerNorm: "norms",
    nn.RMSNorm: "norms",
    Attention: "attention",
    MLP: "MLP",
    Router: "gates",
    CG1: "gates",
    CG2: "gates",
    Experts: "experts",
}
NAMED = {  # kinds by name, before the class
    "shared_expert": "shared expert",
    "attention": "attention",  # timm's
    "patches": "patches",
    "merges": "patches",
    "head": "output",
    "other": "other",
}


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, set[nn.Parameter]]]:
    """Yield the kind of each part, its module, and its parameters without those of earlier parts (tied weights).

    Every parameter is in one part; what is in no known module is in the last one, "other".
    """
    seen: set[nn.Parameter] = set()
    for name, module in [*model.named_modules(), ("other", model)]:  # the model itself last: the rest
        kind = NAMED.get(name.rpartition(".")[2]) or next(
            (kind for base, kind in KINDS.items() if isinstance(module, base)), None
        )
        own = set(module.parameters()) - seen if kind else set()
        if kind and own:
            seen |= own
            yield kind, module, own
