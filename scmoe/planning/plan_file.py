"""The plan of a run as JSON: which schedule each MoE layer runs as, the times it was chosen by, and where they hold.

    {"step": 27, "conditions": {"ranks": 2, "ep_size": 2, ...},
     "layers": [{"schedule": {"architecture": "scmoe", "position": "pos2", "expert_slot": 1, "chunks": 2},
                 "predicted_s": 0.041, "exposed_s": 0.003, "eq11_slot": 2,
                 "times_s": {"2": {"forward": {"attention": 0.004, ...}, "backward": {...}}},
                 "sequential_s": [0.02, 0.05]}]}

Times are those of `LayerChoice`, in seconds, by number of chunks.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scmoe.planning.pricing import LayerChoice
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.schedule import Schedule


def plan_to_json(choices: Sequence[LayerChoice], conditions: dict[str, Any], step: int) -> dict[str, Any]:
    """Return the plan as JSON values. step: after which it was chosen."""
    layers = [
        {
            "schedule": asdict(choice.schedule),
            "predicted_s": choice.predicted,
            "exposed_s": choice.exposed,
            "eq11_slot": choice.eq11.slot,
            "times_s": {str(chunks): asdict(times) for chunks, times in choice.times.items()},
            "sequential_s": list(choice.sequential),
        }
        for choice in choices
    ]
    return {"step": step, "conditions": conditions, "layers": layers}


def plan_from_json(plan: dict[str, Any]) -> list[LayerChoice]:
    """Return the choices of all layers. ValueError: this is no plan."""
    try:
        return [_choice(layer) for layer in plan["layers"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no plan: {error!r}") from error


def _choice(layer: dict[str, Any]) -> LayerChoice:
    times = {int(chunks): OperatorTimes(**directions) for chunks, directions in layer["times_s"].items()}
    forward, backward = layer["sequential_s"]
    return LayerChoice(Schedule(**layer["schedule"]), times, (forward, backward))
