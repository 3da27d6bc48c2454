"""Our samplers keep the tokens of transformers' warpers, with their logits."""

from __future__ import annotations

import pytest
import torch

from scmoe.inference.sampling import keep_top_k, keep_top_p, penalised

logits_process = pytest.importorskip(
    "transformers.generation.logits_process", reason="needs the extra `peers`"
)

pytestmark = [pytest.mark.peers, pytest.mark.inference]


def logits(seed: int = 0, scale: float = 3.0):
    return scale * torch.randn(5, 200, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2, 50, 200, 300])
def test_top_k(top_k):
    theirs = logits_process.TopKLogitsWarper(top_k)(None, logits())
    assert torch.equal(keep_top_k(logits(), top_k), theirs)
    tied = logits().round()
    assert torch.equal(keep_top_k(tied, top_k), logits_process.TopKLogitsWarper(top_k)(None, tied))


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(top_p):
    assert torch.equal(
        keep_top_p(logits(), top_p), logits_process.TopPLogitsWarper(top_p)(None, logits())
    )


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_all_in_their_order(penalty):
    ids = torch.randint(200, (5, 30), generator=torch.Generator().manual_seed(1))
    had = torch.zeros(5, 200, dtype=torch.bool).scatter_(1, ids, True)
    theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits())
    assert torch.equal(penalised(logits(), penalty, had), theirs)
    for warper in (
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.8),
    ):
        theirs = warper(ids, theirs)
    ours = keep_top_p(keep_top_k(penalised(logits(), penalty, had) / 0.7, 20), 0.8)
    assert torch.equal(ours, theirs)
    assert 5 < ours.isfinite().sum() < 5 * 20
