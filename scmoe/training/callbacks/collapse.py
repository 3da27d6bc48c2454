"""The alarm for a router that collapses (fault 26): it sends nearly everything to few experts, and stays so.

Shazeer et al. (2017) describe it: a favoured expert learns faster, so it is favoured more. A busy expert alone is no
fault: many times the fair share for a while is usual, above all at the start. So two things must come together.

    how much    an expert is in the choice of more than half of the tokens that it could have beyond its fair share:
                with K of E experts a token, of more than (K/E + 1) / 2 of all tokens
    how long    in each of PATIENCE logged windows in a row
"""

from __future__ import annotations

from torch import Tensor

PATIENCE = 5


class CollapseAlarm:
    """Speaks once for each layer."""

    def __init__(self) -> None:
        self.windows: dict[int, int] = {}  # layer: for how many windows it has been collapsed, without a break
        self.spoken: set[int] = set()

    def __call__(self, sums_LE2: Tensor) -> list[str]:
        """A line for each layer that has been collapsed for long enough. sums_LE2: `integer_sums` of a window."""
        lines = []
        for layer, (*counts_E, tokens, _) in enumerate(sums_LE2.tolist()):
            busiest = max(range(len(counts_E)), key=counts_E.__getitem__)
            share, fair = counts_E[busiest] / max(tokens, 1), sum(counts_E) / max(tokens, 1) / len(counts_E)
            collapsed = fair < 1 and share > (fair + 1) / 2
            self.windows[layer] = self.windows.get(layer, 0) + 1 if collapsed else 0
            if self.windows[layer] == PATIENCE and layer not in self.spoken:
                self.spoken.add(layer)
                lines.append(
                    f"MoE layer {layer + 1} of {len(sums_LE2)}: the router has collapsed, expert {busiest} gets"
                    f" {share:.0%} of the tokens (fair: {fair:.0%}) for {PATIENCE} logged steps in a row; try a higher"
                    " moe.load_balance_coef or a lower optim.lr"
                )
        return lines
