"""Part pictures: the operators of one pair on the device's streams, forward and backward, as in Fig. 7, and a trace.

`beside` says in numbers what the pictures show: the share of the transfers' time in which an operator computes.
"""

import gzip
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from scmoe.experiments.bench.gpu.gpu_parts import Pieces, Place
from scmoe.experiments.bench.pairs import Setting
from scmoe.experiments.bench.timeline import watch
from scmoe.experiments.engine.ranks import run_alone
from scmoe.schedule.play import Span, draw

SHARE = 0.52
CARD = dict(dim=1024, ffn_dim=4096, heads=16, tokens=16384, seq_len=1024, dtype="bfloat16", rounds=9)
TINY = dict(dim=32, ffn_dim=64, heads=2, tokens=64, seq_len=32, dtype="bfloat16", rounds=2)
KEPT = "pos2-overlapped-1-chunks.json"  # of the traces, by timeline.py


def pieces(place: Place) -> Pieces:
    return {"timelines": lambda: timelines(place)}


def setting_at(place: Place, share: float, **changed: Any) -> Setting:
    """Returns the pair that is measured: real computation, transfers over the bus."""
    sizes: dict[str, Any] = {**(TINY if place.tiny else CARD), **changed}
    return Setting(share, compute="real", device=place.device, shaped=False, bus=True, **sizes)


def timelines(place: Place) -> dict[str, Any]:
    """Returns for each measured timeline its milliseconds and `beside`; draws both directions and keeps one trace."""
    with tempfile.TemporaryDirectory() as folder:
        rate, found = run_alone(watch, setting_at(place, SHARE), "pos2", Path(folder))
        (place.out / "pair.json.gz").write_bytes(gzip.compress(Path(folder, KEPT).read_bytes()))
    facts: dict[str, Any] = {"bus_rate": rate}
    card = torch.cuda.get_device_name() if place.device == "cuda" else "cpu"
    for direction, spans_of in found.items():
        measured = {title: spans for title, spans in spans_of.items() if title.endswith("measured")}
        facts[direction] = {
            title: {"ms": max(s.end for s in spans), "beside": beside(spans)} for title, spans in measured.items()
        }
        title = f"One pair from the tap to its end, {direction}: real compute, {card}"
        facts[f"{direction}_picture"] = drawn(draw, measured, place.out / f"{direction}.png", title, "ms")
    return facts


def beside(spans: Sequence[Span]) -> float:
    """Returns the share of the transfers' time in which an operator computes. Operators do not overlap each other."""
    transfers = [s for s in spans if s.is_transfer]
    others = [s for s in spans if not s.is_transfer]
    both = sum(max(0.0, min(t.end, o.end) - max(t.start, o.start)) for t in transfers for o in others)
    return both / sum(t.end - t.start for t in transfers)


def drawn(draw: Callable[..., None], what: Any, path: Path, *words: str) -> str:
    """Draws `what` into a file and returns its name, or says why there is none."""
    if find_spec("matplotlib") is None:
        return "not drawn: matplotlib is missing"
    draw(what, path, *words)
    return path.name
