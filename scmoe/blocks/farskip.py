"""FarSkip (arXiv 2511.11505): attention reads the stream without the routed output of the block
before, and all experts read the block's own input.

    X_l --+-----------------------> + -----------> + ---+--------> + --> X_{l+1}
          |                         ^              ^    |          ^
          |   Y_l --> norm --> attention           |    |          |
          +--> norm --+--> SE ---------------------+    |          |
                      +--> route, dispatch, experts, combine ------+
                                                        +--------------> Y_{l+1}

    u_l     = n'(X_l)
    Y_{l+1} = (X_l + A(n(Y_l))) + SE(u_l)          in this order
    X_{l+1} = Y_{l+1} + R(u_l)

In the first block Y_0 = X_0. Dispatch hides behind attention, combine behind the shared expert. A
block ends where its stream does, so no stream stays open from block to block: Y is the `carry`. The
publication also computes the next block's queries, keys and values beside combine. This is left
out; here they would be computed after the shared expert and handed on as the carry.
"""

from torch import Tensor, nn

from scmoe.blocks.kv_cache import KVCache
from scmoe.blocks.moe_block import MoEBlock
from scmoe.blocks.sublayers import Residual
from scmoe.moe.tokens import HandedOn, MoEOutput


class FarSkipDenseBlock(nn.Module):
    """A dense block of the same model, before all others.

    X + A(n(X)) + MLP(n'(X)): both read its input.
    """

    def __init__(self, attention: Residual, mlp: Residual) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList([attention, mlp])

    def forward(
        self, x_BSD: Tensor, mask_BS: Tensor | None = None, cache: KVCache | None = None
    ) -> MoEOutput:
        attention, mlp = self.sublayers
        return MoEOutput(mlp(x_BSD, cache, onto=attention(x_BSD, cache)), None)


class FarSkipBlock(MoEBlock):
    """`norm` is n', read by all experts; the attention sub-layer has its own norm, n."""

    architecture = "farskip"
    shared_expert: nn.Module

    def check_parts(self) -> None:
        assert self.tap_norm is None and self.shared_expert is not None
        assert self.coefficient is None, "FarSkip adds both outputs, without weights"

    def forward(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        carry: Tensor | None = None,
    ) -> HandedOn:
        """Return X_{l+1}, and Y_{l+1} as the carry.

        carry: Y_l, the stream without the preceding routed output; None: in the first block, X_0.
        """
        u_BSD = self.norm(x_BSD)
        state = self.moe.begin(u_BSD, mask_BS, self.schedule.chunks)
        routed_free_BSD = x_BSD if carry is None else carry
        h_BSD, state = self.through_window(routed_free_BSD, state, cache, onto=x_BSD)
        shared_BSD, state = self.through_shared_expert(u_BSD, state)
        y_BSD = h_BSD + self.after(shared_BSD)
        routed_BSD, stats = self.moe.finish(state)
        return HandedOn(y_BSD + self.after(routed_BSD), stats, y_BSD)
