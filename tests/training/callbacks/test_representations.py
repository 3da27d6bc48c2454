"""The matrix of Fig. 10 and the norms of Eq. 22 are right, and the probes read every representation
of the residual stream once."""

import numpy as np
import pytest
import torch

from scmoe.config.load import load_config
from scmoe.training.callbacks.representations import (
    GradientProbe,
    SimilarityProbe,
    cosine_matrix,
    gradient_metrics,
    means,
    similarity_metrics,
)
from tests.support.models import assert_close, hooks, tiny, tiny_batch, tiny_model


def test_cosines_by_hand():
    """The cosines per token are 0 and 1 (a, b), 0.6 and 0.8 (a, c), 0.8 twice (b, c); the matrix
    has their means."""
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    b = torch.tensor([[0.0, 1.0], [0.0, 5.0]])
    c = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    wider = torch.ones(2, 3)
    matrix = cosine_matrix([a, b, c, wider])
    expected = torch.tensor(
        [[1.0, 0.5, 0.7], [0.5, 1.0, 0.8], [0.7, 0.8, 1.0]], dtype=torch.float64
    )
    assert_close(matrix[:3, :3], expected, 1e-7)
    assert matrix[3, 3].item() == pytest.approx(1)
    assert matrix[3, :3].isnan().all() and matrix[:3, 3].isnan().all()


def test_the_mean_over_ranks_and_the_metric():
    one, other = torch.tensor([[1.0, 0.2], [0.2, 1.0]]), torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    ones = torch.ones(2, 1)
    mean = means(torch.cat([one, ones], 1) + torch.cat([other, ones], 1))
    assert_close(mean, torch.tensor([[1.0, 0.4], [0.4, 1.0]]), 1e-6)
    assert similarity_metrics(mean.numpy()) == {"similarity/neighbours": pytest.approx(0.4)}
    across = np.array([[1.0, 0.5, np.nan], [0.5, 1.0, np.nan], [np.nan, np.nan, 1.0]])
    assert similarity_metrics(across) == {"similarity/neighbours": pytest.approx(0.5)}


PAIR = ["0 attention", "0 MLP", "1 attention", "1 MoE"]


@pytest.mark.parametrize(
    "words, labels",
    [
        ("moe.architecture=scmoe", ["input", *PAIR]),
        ("moe.architecture=dgmoe", ["input", *PAIR]),
        ("moe.architecture=top_k", ["input", *PAIR]),
        ("moe.architecture=dense", ["input", "0 attention", "0 MLP", "1 attention", "1 MLP"]),
        (
            "moe.architecture=scmoe moe.every=1 moe.position=pos1",
            ["input", "0 attention", "0 MoE", "1 attention", "1 MoE"],
        ),
    ],
)
def test_every_representation_is_read_once_in_order(words, labels):
    config = tiny(*words.split())
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    plain = model(ids).logits_BSV
    probe = SimilarityProbe(model)
    assert torch.equal(model(ids).logits_BSV, plain)
    probe.remove()
    assert probe.labels() == labels and hooks(model) == 0
    first, last = probe.kept[0][1], probe.kept[-1][1]
    embedded = model.tokens(ids) + model.positions.weight[: ids.shape[1]]
    assert torch.equal(first, embedded.flatten(0, 1))
    assert torch.equal(model.head(model.norm(last)), plain.flatten(0, 1))
    matrix = means(probe.result())
    assert_close(matrix, matrix.T, 1e-12)
    assert_close(matrix.diagonal(), torch.ones(len(labels), dtype=torch.float64), 1e-12)
    model(ids)
    assert probe.labels() == labels, "a removed probe reads nothing"


@pytest.mark.parametrize("words", ["moe.architecture=top_k", "moe.position=pos3", "moe.every=1"])
def test_the_norm_of_the_gradient_of_every_representation(words):
    """With one sequence a position's embedding has the gradient of the input there. The last
    representation is read by the norm before the head alone."""
    config = tiny(*words.split())
    model = tiny_model(config)
    ids, labels = tiny_batch(config, 1)
    probe = GradientProbe(model)
    read_last = []
    handle = model.norm.register_full_backward_hook(lambda *args: read_last.append(args[1][0]))
    torch.nn.functional.cross_entropy(model(ids).logits_BSV[0], labels[0]).backward()
    probe.remove()
    handle.remove()
    norms, ones = probe.result().unbind(1)
    assert_close(norms[0], model.positions.weight.grad.norm(), 1e-12)
    assert_close(norms[-1], read_last[0].norm(), 1e-12)
    assert (norms > 0).all() and (ones == 1).all()

    similarity = SimilarityProbe(model)
    model(ids)
    similarity.remove()
    assert probe.labels() == similarity.labels() and hooks(model) == 0
    metrics = gradient_metrics(means(probe.result()).numpy())
    assert metrics == {"gradients/first_over_last": pytest.approx((norms[0] / norms[-1]).item())}


def test_behind_frozen_weights_the_norm_is_0():
    model, (ids, _) = tiny_model(tiny()), tiny_batch(tiny())
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    probe = GradientProbe(model)
    model(ids).logits_BSV.sum().backward()
    assert not probe.result()[:, 0].any()


def test_stages_of_an_image_model_are_not_compared_with_each_other():
    """The width doubles from stage to stage, so each stage has its own input and its own part of
    the matrix."""
    pytest.importorskip("timm", reason="SwinV2 needs the extra `vision`")
    words = (
        "model.family=swin model.layers=2 model.dim=8 model.heads=1 model.patch_size=2"
        " model.window=2"
    )
    words += " data.name=digits data.image_size=32 data.num_classes=5"
    model = tiny_model(load_config(None, words.split()), torch.float32)
    probe = SimilarityProbe(model)
    model(torch.randn(2, 3, 32, 32))
    probe.remove()
    parts = (
        "0 attention",
        "0 MLP",
        "1 attention",
        "1 MLP",
        "2 attention",
        "2 MLP",
        "3 attention",
        "3 MLP",
    )
    parts += (
        "4 attention",
        "4 MLP",
        "5 attention",
        "5 MoE",
        "6 attention",
        "6 MLP",
        "7 attention",
        "7 MoE",
    )
    assert [label for label in probe.labels() if label != "input"] == list(parts)
    assert [i for i, label in enumerate(probe.labels()) if label == "input"] == [0, 5, 10, 15]
    matrix = means(probe.result())
    blocks = matrix.isfinite().double()
    assert torch.equal(blocks, torch.block_diag(*[torch.ones(5, 5, dtype=torch.float64)] * 4))
    assert_close(matrix.diagonal(), torch.ones(20, dtype=torch.float64), 1e-12)
    assert hooks(model) == 0


def test_keeps_few_tokens_evenly_spaced():
    config = tiny()
    model, (ids, _) = tiny_model(config), tiny_batch(config)
    whole, some = SimilarityProbe(model), SimilarityProbe(model, max_tokens=10)
    model(ids)
    for (_, every), (_, kept) in zip(whole.kept, some.kept, strict=True):
        assert torch.equal(kept, every[::3])
