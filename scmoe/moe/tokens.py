"""The legend of dimension letters, and the values that travel between the parts of an MoE module.

Dimension letters end the names of tensors: B batch, S sequence, T tokens here (B S), D model, F ffn
hidden, H heads, V vocabulary, E experts, e experts here, K experts per token, N = T K routed
copies, R rows of a buffer, C slots of an expert, P chunks, L MoE layers.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """The router's decision. A padding token has expert id E (none) and weight 0.

    With Z zero experts (stream.py) E counts them too, here and in the names of scores.
    """

    topk_ids_TK: Tensor  # int64, 0..E
    topk_weights_TK: Tensor  # in the router's precision (float32 or wider)
    scores_TE: Tensor  # of all experts; softmax or the scoring's own
    logits_TE: Tensor


class RouterStats(NamedTuple):
    """Sums over this rank's tokens, for the losses and load metrics of one MoE layer.

    They are sums, not means, because ranks may hold different numbers of real tokens, and sums add
    up over ranks.
    """

    # routed copies per expert, before any is dropped; no gradient; without zero experts
    counts_E: Tensor
    # sum over tokens of scores; carries the gradient of the load-balance loss; with zero experts
    score_sums_E: Tensor
    z_sum: Tensor  # sum over tokens of logsumexp(logits)^2
    num_tokens: Tensor  # real tokens
    num_dropped: Tensor  # routed copies beyond a capacity or buffer
    top_k: int  # routed copies of a token, those to zero experts included
    # score_sums_E are multiplied by the load of each token's own sequence
    per_sequence: bool = False


class MoEOutput(NamedTuple):
    """Output of an MoE module or of a block that holds one: [B, S, D] and the router's sums.

    stats: None if the block has no MoE module, or if the sums are not computed (stream.dropless).
    """

    y_BSD: Tensor
    stats: RouterStats | None


class HandedOn(NamedTuple):
    """Output of a block that leaves an activation for the next one, which gets it as `carry`.

    It is never an open stream: each block finishes the stream that it begins, so nothing else is
    communicated in between.
    """

    y_BSD: Tensor
    stats: RouterStats | None
    carry_BSD: Tensor
