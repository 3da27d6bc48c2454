"""The plan of a run, plan.json: what the planner has measured and chosen, how many batches were in
flight from which step on, and whether a resumed run may take it."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scmoe.planning.choice import LayerChoice, ModelChoice
from scmoe.schedule.cost import OperatorTimes
from scmoe.schedule.schedule import Schedule

Plan = Mapping[str, Any]
NO_PLAN: Plan = MappingProxyType({})


def plan_to_json(
    choice: ModelChoice, conditions: dict[str, Any], step: int, earlier: Plan = NO_PLAN
) -> dict[str, Any]:
    """Return the plan of a run as JSON values, with times in seconds.

    step: number of steps before it runs. earlier: the plan of the run before it.

    {"step": 27, "in_flight_from": [[27, 1]], "conditions": {"ranks": 2, "ep_size": 2, ...},
     "layers": [{"schedule": {"architecture": "scmoe", "position": "pos2", "expert_slot": 1,
                              "chunks": 2, "inside_attention": false},
                 "predicted_s": 0.041, "exposed_s": 0.003, "eq11_slot": 2,
                 "times_s": {"2": {"forward": {"attention": 0.004, ...}, "backward": {...}}},
                 "sequential_s": [0.02, 0.05], "batches_in_flight": 1}]}
    """
    layers = [
        {
            "schedule": asdict(layer.schedule),
            "predicted_s": predicted_s,
            "exposed_s": exposed_s,
            "eq11_slot": layer.eq11.slot,
            "times_s": {str(chunks): asdict(times) for chunks, times in layer.times.items()},
            "sequential_s": list(layer.sequential),
            "batches_in_flight": choice.batches,
        }
        for layer, (predicted_s, exposed_s) in zip(
            choice.layers, choice.predicted_and_exposed, strict=True
        )
    ]
    before = [[since, batches] for since, batches in in_flight_from(earlier) if since < step]
    return {
        "step": step,
        "in_flight_from": [*before, [step, choice.batches]],
        "conditions": conditions,
        "layers": layers,
    }


def up_to(plan: Plan, step: int) -> Plan:
    """Return the plan of a run that is resumed from a step: without the choices after it."""
    return {"in_flight_from": [each for each in in_flight_from(plan) if each[0] <= step]}


def in_flight_from(plan: Plan) -> list[list[int]]:
    """Return [number of steps before, batches in flight] of each choice of a run; none without a
    plan."""
    return [[int(step), int(batches)] for step, batches in plan.get("in_flight_from", ())]


def in_flight_at(plan: Plan, steps: int) -> int:
    """Return how many batches a run had in flight in the last of so many steps: one before the
    first choice. The steps in which a choice is made again count as those of the choice before."""
    numbers = [batches for since, batches in in_flight_from(plan) if since < steps]
    return numbers[-1] if numbers else 1


def kept_plan(path: Path, conditions: Mapping[str, Any]) -> Plan:
    """Return the plan that a run has kept, if it is valid under these conditions. NO_PLAN: there is
    none, or it is refused; a line on standard error then says why, as the plan is measured
    again."""
    if not path.exists():
        return NO_PLAN
    try:
        return read_plan(path, conditions)
    except ValueError as error:
        print(f"plan: measured again, because {error}", file=sys.stderr, flush=True)
        return NO_PLAN


def read_plan(path: Path, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan in a file. ValueError: it cannot be read, or was measured under other
    conditions than these."""
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        plan_from_json(plan)
        measured_under = dict(plan["conditions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error!r}") from error
    for key, value in conditions.items():
        if measured_under.get(key) != value:
            was = measured_under.get(key, "not kept")
            raise ValueError(f"{key} was {was} in {path} and is {value} now")
    return plan


def plan_from_json(plan: Plan) -> ModelChoice:
    """Return what was chosen. ValueError: this is no plan."""
    try:
        layers = plan["layers"]
        batches = max((layer["batches_in_flight"] for layer in layers), default=1)
        return ModelChoice(tuple(map(_layer, layers)), batches)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no plan: {error!r}") from error


def _layer(layer: Mapping[str, Any]) -> LayerChoice:
    times = {
        int(chunks): OperatorTimes(**directions) for chunks, directions in layer["times_s"].items()
    }
    forward, backward = layer["sequential_s"]
    return LayerChoice(Schedule(**layer["schedule"]), times, (forward, backward))
