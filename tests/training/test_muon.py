"""Muon updates every matrix by itself, an expert's too; each parameter is in one list; state can be
loaded."""

import pytest
import torch
from torch import nn

from scmoe.moe.experts import Experts
from scmoe.parallel.checkpoint.state import optimizer_state
from scmoe.parallel.mesh import Mesh
from scmoe.training.assembly.model import build_module
from scmoe.training.muon import MuonAndAdamW, Trained, adamw
from tests.support.models import tiny


def parameters(seed: int = 0) -> Trained:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "matrices": [(4, 8, 24), (16, 8)],
        "decayed": [(8, 3, 2, 2)],
        "undecayed": [(8,), (8,)],
    }
    return Trained(
        **{
            k: [nn.Parameter(torch.randn(s, generator=generator)) for s in v]
            for k, v in shapes.items()
        }
    )


def steps(
    optimizer: torch.optim.Optimizer, ps: list[nn.Parameter], first: int = 0, last: int = 3
) -> None:
    for step in range(first, last):
        for i, p in enumerate(ps):
            p.grad = (
                torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                * 10.0**i
            )
        optimizer.step()


def test_each_expert_is_updated_as_torchs_muon_updates_a_single_matrix():
    """Its update is the same, to the last bit, whatever other experts the rank holds."""
    ours, alone = parameters(), parameters()
    experts, matrix = alone.matrices
    singles = [nn.Parameter(e.detach().clone()) for e in experts]
    optimizer = MuonAndAdamW(ours, lr=0.02, weight_decay=0.3, momentum=0.9)
    options = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    theirs = torch.optim.Muon([*singles, matrix], **options)
    for step in range(3):
        gradients = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            for p in ours.matrices
        ]
        gradients[0] *= torch.tensor([1.0, 1e3, 0.0, 1e-3])[
            :, None, None
        ]  # the third expert has no tokens
        for p, gradient in zip(ours.matrices, gradients, strict=True):
            p.grad = gradient.clone()
        for p, gradient in zip([*singles, matrix], [*gradients[0], gradients[1]], strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        theirs.step()
    assert torch.equal(ours.matrices[0], torch.stack([*singles])) and torch.equal(
        ours.matrices[1], matrix
    )
    change = (ours.matrices[0] - parameters().matrices[0] * (1 - 0.02 * 0.3) ** 3).norm(dim=(1, 2))
    assert change[2] < 1e-5, "no gradient"
    assert change[[0, 1, 3]].max() < 1.5 * change[[0, 1, 3]].min(), (
        "sizes of gradients do not matter"
    )


def test_the_rest_is_updated_by_adamw_and_state_can_be_loaded():
    whole, plain, parts = parameters(), parameters(), parameters()
    optimizer = MuonAndAdamW(whole, lr=0.01)
    steps(optimizer, [*whole.decayed, *whole.undecayed, *whole.matrices])
    steps(adamw(plain, lr=0.01), [*plain.decayed, *plain.undecayed, *plain.matrices])
    for ours, theirs in zip(
        [*whole.decayed, *whole.undecayed], [*plain.decayed, *plain.undecayed], strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not torch.equal(whole.matrices[0], plain.matrices[0])

    order = [*parts.decayed, *parts.undecayed, *parts.matrices]
    first, second = MuonAndAdamW(parts, lr=0.01), MuonAndAdamW(parts, lr=0.5)
    steps(first, order, 0, 2)
    second.load_state_dict(first.state_dict())
    steps(second, order, 2, 3)
    assert all(
        torch.equal(a, b)
        for x, y in zip(whole, parts, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(
    "words", ["model.family=gpt", "model.family=llama", "moe.architecture=dense", "moe.combine=cg2"]
)
def test_every_parameter_is_in_one_list(words):
    """Muon gets the matrices of hidden layers, gates and experts, not the embedding and the output
    layer. Norms, biases and embeddings do not decay; a token embedding that is also the head is a
    matrix and does."""
    module = build_module(tiny(words, "optim.name=muon"))
    module.configure_model()
    trained, names = module.trained(), {p: name for name, p in module.model.named_parameters()}
    assert sorted(names[p] for kind in trained for p in kind) == sorted(names.values())
    tied = module.model.head.weight is module.model.tokens.weight
    embeddings = ("positions",) if tied else ("positions", "tokens")
    vectors = {name for p, name in names.items() if p.dim() < 2 or name.startswith(embeddings)}
    assert {names[p] for p in trained.undecayed} == vectors
    matrices = {names[p] for p in trained.matrices}
    assert not {name for name in matrices if name.startswith(("tokens", "positions", "head"))}
    experts = {name for name in names.values() if name.endswith(("w_in_eDF", "w_out_eFD"))}
    assert experts <= matrices and bool(experts) == ("dense" not in words)
    assert {
        name for p, name in names.items() if name.startswith("blocks") and p.dim() > 1
    } == matrices


def test_state_of_experts_that_cannot_be_put_together_is_not_saved():
    """Adafactor keeps sums over rows and columns. Of two ranks' sums for different experts one
    would be lost."""
    experts = Experts(16, 32, 4, range(2))
    optimizer = torch.optim.Adafactor(experts.parameters())
    for p in experts.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match=r"keeps row_var \(.*\) of w_in_eDF"):
        optimizer_state(experts, optimizer, Mesh(0, 2, 2))
    assert optimizer_state(experts, optimizer, Mesh())["state"]
