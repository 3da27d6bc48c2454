"""All tables of the paper in turn, as one study that can be stopped and continued.

The cost of every table is printed before the first begins; its file states the minutes. After each table the time left
is corrected by the time that the earlier ones took. A failed run ends neither its table nor the study.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from scmoe.config.leaves import ConfigError
from scmoe.experiments.studies.progress import clock
from scmoe.experiments.studies.table.make import Commands, Plan, Request, make_table, plan_table
from scmoe.experiments.studies.table.rows import load_table
from scmoe.experiments.studies.table.table_runs import read_states

FIRST_RATIO = 1.0  # of measured over stated time, before anything has been measured


def reproduce(names: Sequence[str], request: Request, commands: Commands) -> dict[str, Any]:
    """Make the tables and return {tables: rows with a result by number, failed, cut, seconds, signal}.

    Raises ConfigError for an error in the request or in a table's file before anything starts.
    """
    plans = {name: plan_table(load_table(name), request, commands.say) for name in names}
    costs = {name: seconds_to_do(plan) for name, plan in plans.items()}
    for name, plan in plans.items():
        runs = f"{len(plan.runs)} runs of {len(plan.table.rows)} rows"
        commands.say(f"{name} at {plan.scale_name}: {runs}{_about(costs[name])}, in {plan.folder}")
    started, found, failed, cut = time.monotonic(), {}, 0, 0
    for i, (name, plan) in enumerate(plans.items()):
        say_time_left(commands.say, costs, i, time.monotonic() - started)
        commands.say(f"{plan.table.title}")
        try:
            made = make_table(plan, request, commands)
        except ConfigError as error:  # such as another process in this table's folder
            commands.say(f"failed: {name}: {error}")
            failed += 1
            continue
        for path in made.files:
            commands.say(str(path))
        found[name.removeprefix("table")] = made.rows
        failed, cut = failed + made.failed, cut + made.cut
        if made.signal:
            commands.say("stopped; the same command continues")
            return _facts(found, failed, cut, started, made.signal)
    return _facts(found, failed, cut, started, 0)


def _facts(tables: dict[str, int], failed: int, cut: int, started: float, signal: int) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    return {"tables": tables, "failed": failed, "cut": cut, "seconds": seconds, "signal": signal}


def seconds_to_do(plan: Plan) -> float:
    """Return the stated time of a table for the part of its runs that is not finished; 0 for launch files."""
    read_states(plan.runs)
    to_do = sum(run.state.status != "finished" for run in plan.runs)
    return 60 * plan.scale.minutes * to_do / (len(plan.table.rows) * plan.scale.seeds)


def say_time_left(say: Callable[[str], None], costs: dict[str, float], done: int, spent: float) -> None:
    """Say the time left of all tables from number `done` on. spent: seconds that the ones before it have taken."""
    values = list(costs.values())
    before, left = sum(values[:done]), sum(values[done:])
    ratio = spent / before if before else FIRST_RATIO
    if left:
        say(f"{len(values) - done} of {len(values)} tables to do, about {clock(left * ratio)} left")


def _about(seconds: float) -> str:
    return f", about {clock(seconds)}" if seconds else ""
