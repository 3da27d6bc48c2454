"""Warns of a router that sends nearly all tokens to few experts."""

from collections.abc import Collection

from torch import Tensor

PATIENCE = 5  # logged windows in a row


class CollapseAlarm:
    """Detects a collapsed router: one that keeps sending nearly all tokens to few experts.

    An expert that gets more tokens learns faster, so it gets even more (Shazeer et al. 2017). A
    busy expert alone is no fault: many times the fair share is usual at the start. The alarm is
    raised once for each layer, where both hold:

        how much    an expert is chosen by more than (K/E + 1) / 2 of all tokens, where each token
                    chooses K of E experts: this limit is halfway between its fair share, K/E, and
                    all tokens
        how long    in each of PATIENCE logged windows in a row

    doubled: the layers whose sums count each token twice, those of DGMoE.
    """

    def __init__(self, doubled: Collection[int] = ()) -> None:
        self.doubled = doubled
        # layer: number of windows in a row in which it was collapsed
        self.windows: dict[int, int] = {}
        self.reported: set[int] = set()

    def __call__(self, sums_LE2: Tensor) -> list[str]:
        """Return a message for each layer, from 0, that has now collapsed. sums_LE2: `integer_sums`
        of a window."""
        lines = []
        for layer, (*counts_E, tokens, _) in enumerate(sums_LE2.tolist()):
            busiest = max(range(len(counts_E)), key=counts_E.__getitem__)
            tokens = max(tokens / (2 if layer in self.doubled else 1), 1)
            share = counts_E[busiest] / tokens
            fair = sum(counts_E) / tokens / len(counts_E)
            collapsed = fair < 1 and share > (fair + 1) / 2
            self.windows[layer] = self.windows.get(layer, 0) + 1 if collapsed else 0
            if self.windows[layer] == PATIENCE and layer not in self.reported:
                self.reported.add(layer)
                lines.append(
                    f"MoE layer {layer}: the router has collapsed, expert {busiest} gets"
                    f" {share:.0%} of the tokens (fair: {fair:.0%}) for {PATIENCE} logged steps in"
                    " a row; try a higher moe.load_balance_coef or a lower optim.lr"
                )
        return lines
