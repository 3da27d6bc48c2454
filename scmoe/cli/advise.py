"""`scmoe advise` says whether a shortcut would pay on a cluster, before anything is trained."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result

if TYPE_CHECKING:
    from scmoe.predict.advice import Request
    from scmoe.predict.advise import Advice, Row
    from scmoe.predict.profile import Profile

FEW_TOKENS = 4096
PICTURE = Path("runs/advise.png")
SHORTCUT = "scmoe_pos2"  # the row that is shown for each value of a list
COLUMNS = {
    "step, ms": "{step_ms:.1f}",
    "5 to 95 %": "{interval[0]:.1f} {interval[1]:.1f}",
    "exposed": "{exposed_rows_ms:.1f} + {exposed_gradients_ms:.1f}",
    "/ top-k": "{over_top2:.2f}",
    "/ shared": "{over_shared:.2f}",
    "/ best": "{over_best:.2f} [{over_best_interval[0]:.2f} {over_best_interval[1]:.2f}]",
    "/ best shared": (
        "{over_best_shared:.2f} [{over_best_shared_interval[0]:.2f}"
        " {over_best_shared_interval[1]:.2f}]"
    ),
    "slot x chunks": "{slot} x {chunks}",
    "GiB": "{gib}",
    "answer": "{answer}",
}
COLUMNS_OF_LIST = {
    "waits": "{share:.0%}",
    "top-k, ms": "{standard_ms:.1f}",
    "Pos-2, ms": "{step_ms:.1f}",
    "/ top-k": "{over_top2:.2f} [{over_top2_interval[0]:.2f} {over_top2_interval[1]:.2f}]",
    **{name: COLUMNS[name] for name in ("/ best", "/ best shared", "answer")},
}
LEGEND = (
    "exposed: waiting for rows + sums of gradients, in ms. Speed-ups: / top-k is over the"
    " sequential standard model; / shared over shared-expert with one batch in flight; / best over"
    " the best row of the standard model, for its own rows over the sequential one; / best shared"
    " over the best row of shared-expert. GiB: an upper bound for the row's own chunks, batches in"
    " flight and load. Everything is predicted."
)
LEGEND_OF_LIST = (
    "waits: the share of the sequential standard model's step in which ranks wait for rows. Of"
    " ScMoE Pos-2, with one batch in flight: / top-k is over that model, / best over its best row,"
    " / best shared over the best row of shared-expert. Everything is predicted."
)


def main(config: str, /, *words: KeyValue) -> None:
    """Say whether a shortcut would pay on a cluster: each architecture's step by simulation, with
    an interval, and an answer. Nothing is trained.

    The last line of standard output is JSON. Any one key may have several values, such as
    samples=1,2,4: a line each, and a picture in runs/advise.png.

    Args:
        config: a YAML file, or the name of a shipped one, such as gpt2_moe_medium
        words: cluster=NAME: a profile of configs/cluster, a file, or measure, which measures this
            machine. ranks=N (default: all ranks of the cluster). ep=N: ranks that share the experts
            (default: the largest number that divides ranks and experts). samples=N of a rank in one
            batch (default: as CONFIG has it; a preset has 16,384 tokens or 128 images in a step,
            in as few batches as fit the card). load=KIND: uneven routing, as `scmoe bench` has it.
            cluster.KEY=NUMBER: a value of the profile. key=value: an override of CONFIG
    """
    listed = [word for word in words if is_list(word)]
    if len(listed) > 1:
        keys = " and ".join(word.partition("=")[0] for word in listed)
        raise ConfigError(f"command line: {keys} have several values each. Give one key a list")
    if listed:
        advise_each(config, words, listed[0])
        return
    request, profile = request_of(config, words)
    advice, settings = advice_of(request, profile)
    show(request, profile, advice, settings)
    print_result(facts_of(request, profile, advice, settings))


def is_list(word: str) -> bool:
    """Return whether a word gives its key several values. A list in brackets is one value."""
    value = word.partition("=")[2]
    return "," in value and not value.startswith(("[", "{"))


def advise_each(config: str, words: Sequence[str], listed: str) -> None:
    """Print a line and the JSON of each value of a list, and draw the speed-ups. listed: the word
    that has the list."""
    from scmoe.config.installation import require
    from scmoe.report import Report, say

    require("scmoe advise with a list", "matplotlib")
    key, _, values = listed.removeprefix("--").partition("=")
    requests = {
        value: request_of(config, [f"{key}={value}" if word == listed else word for word in words])
        for value in values.split(",")
    }
    facts: dict[str, dict[str, Any]] = {}
    for value, (request, profile) in requests.items():
        facts[value] = facts_of(request, profile, *advice_of(request, profile))
    lines = {value: line_of(each) for value, each in facts.items()}
    Report(f"{config}, by {key}", lines, COLUMNS_OF_LIST, key).show()
    say(LEGEND_OF_LIST)
    draw(lines, key, f"ScMoE Pos-2, {Path(config).stem}\nPrediction; whiskers: 5 to 95 %")
    say(f"picture: {PICTURE}")
    print_result({"key": key, "values": facts})


def request_of(config: str, words: Sequence[str]) -> "tuple[Request, Profile]":
    """Return what some words ask for, and on which cluster. ConfigError: a word or name is
    wrong."""
    sizes, others = numbers_of(words, ("ranks", "ep", "samples"))
    named = {"cluster": "", "load": "balanced"}
    overrides: list[str] = []
    of_cluster: list[str] = []
    for word in others:
        key, _, value = word.removeprefix("--").partition("=")
        if key in named:
            named[key] = value
        else:
            (of_cluster if key.startswith("cluster.") else overrides).append(word)
    if not named["cluster"]:
        from scmoe.predict.profile import names

        raise ConfigError(
            f"command line: cluster is missing, allowed: {', '.join([*names(), 'measure'])}, or a"
            " YAML file"
        )
    from scmoe.config.load import read_unchecked

    read_unchecked(config, overrides)  # so that a wrong name is refused before torch is imported
    profile = profile_of(named["cluster"], of_cluster)
    from scmoe.predict.advice import Request

    request = Request(
        config, overrides, sizes.get("ranks"), sizes.get("ep"), sizes.get("samples"), named["load"]
    )
    return request, profile


def profile_of(name: str, words: list[str]) -> "Profile":
    """Return a profile by name, or this machine's."""
    from scmoe.predict.profile import overridden, read_profile

    return overridden(measured(), words) if name == "measure" else read_profile(name, words)


@cache
def measured() -> "Profile":
    """Return this machine's profile. It is measured once, also for a list of values."""
    from scmoe.predict.measure import measure

    return measure()


def advice_of(request: "Request", profile: "Profile") -> "tuple[Advice, Config]":
    from scmoe.predict.advice import advice_for
    from scmoe.report import console

    with console().status("counting and simulating each architecture"):  # on a terminal
        return advice_for(request, profile)


def show(request: "Request", profile: "Profile", advice: "Advice", settings: Config) -> None:
    """Print an advice: its table, each row's reason, and what to know of this job."""
    from scmoe.report import Report, say

    trainer = settings.trainer
    ranks = trainer.devices * trainer.num_nodes
    in_batches = f" ({trainer.accumulate} batches)" if trainer.accumulate > 1 else ""
    title = (
        f"{request.config} on cluster {profile.name}: {ranks} ranks, EP"
        f" {settings.strategy.ep_size}, {advice.tokens:,} tokens of a rank in a step{in_batches},"
        f" load {request.load}"
    )
    rows = {name: row_to_json(row) for name, row in advice.rows.items()}
    shown = {name: {**row, "gib": memory_in_words(row, profile)} for name, row in rows.items()}
    Report(title, shown, COLUMNS, "row").show()
    say(LEGEND)
    for name, row in advice.rows.items():
        say(f"{name}: {row.answer}. {row.why}")
    if ranks > 1 and settings.strategy.ep_size == 1 and request.ep_size is None:
        say(
            f"EP is 1, as no larger number divides {ranks} ranks and the experts, so no rows"
            " travel. Give another number of ranks or experts."
        )
    if all(row.fits is False for row in advice.rows.values()):
        say(
            "No row fits. Fewer samples with more trainer.accumulate, more ranks, a larger EP, or"
            " trainer.recompute=true need less memory."
        )
    if all(row.choice.batches_in_flight == 1 for row in advice.rows.values()):
        say(
            "A rank has one sample in a batch, which cannot be halved, so there are no rows with"
            " two batches in flight. Give samples=2 or more for them, if the memory is there."
        )
    of_a_batch = advice.tokens // trainer.accumulate
    if of_a_batch < FEW_TOKENS:
        say(
            f"A rank has only {of_a_batch:,} tokens in a batch. Launches and latency decide there,"
            " and no measurement of this project checks them."
        )
    if profile.guesses:
        say(f"guesses of this profile: {', '.join(profile.guesses)}")


def facts_of(
    request: "Request", profile: "Profile", advice: "Advice", settings: Config
) -> dict[str, Any]:
    """Return an advice as JSON."""
    trainer = settings.trainer
    return {
        "job": {
            "config": request.config,
            "cluster": profile.name,
            "ranks": trainer.devices * trainer.num_nodes,
            "ep": settings.strategy.ep_size,
            "tokens": advice.tokens,
            "batches": trainer.accumulate,
            "load": request.load,
            "standard": advice.standard,
            "share": advice.share,
        },
        "rows": {name: row_to_json(row) for name, row in advice.rows.items()},
        "standard": advice.standard,
        "best_without_another_model": advice.best,
        "carried_by": advice.tier,
        "guesses": profile.guesses,
    }


def memory_in_words(row: Mapping[str, Any], profile: "Profile") -> str:
    """Return a row's GiB, with what the card has where that is less."""
    needed = f"{row['memory_gib']:.1f}"
    if profile.memory is None or row["fits"]:
        return needed
    return f"{needed} > {profile.memory / 2**30:.1f}"


def row_to_json(row: "Row") -> dict[str, Any]:
    """Return a row's figures in milliseconds and GiB. `over_top2` is over the sequential standard
    model, whatever its top-k."""
    return {
        "step_ms": 1e3 * row.step.total,
        "interval": [1e3 * seconds for seconds in row.step_interval],
        "over_top2": row.over_standard,
        "over_top2_interval": list(row.over_standard_interval),
        "over_shared": row.over_shared,
        "over_shared_interval": list(row.over_shared_interval),
        "over_best": row.over_best,
        "over_best_interval": list(row.over_best_interval),
        "over_best_shared": row.over_best_shared,
        "over_best_shared_interval": list(row.over_best_shared_interval),
        "answer": row.answer,
        "why": row.why,
        "slot": row.choice.schedule.slot,
        "chunks": row.choice.schedule.chunks,
        "batches_in_flight": row.choice.batches_in_flight,
        "exposed_rows_ms": 1e3 * row.step.exposed_rows,
        "exposed_gradients_ms": 1e3 * row.step.exposed_gradients,
        "computing_ms": 1e3 * row.step.computing,
        "slowed_ms": 1e3 * row.step.slowed,
        "update_ms": 1e3 * row.step.update,
        "other_ms": 1e3 * row.step.other,
        "memory_gib": row.memory / 2**30,
        "fits": row.fits,
    }


def line_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of an advice beside others."""
    standard_ms = facts["rows"][facts["standard"]]["step_ms"]
    share = facts["job"]["share"]
    return {"share": share, "standard_ms": standard_ms, **facts["rows"][SHORTCUT]}


def draw(lines: Mapping[str, Mapping[str, Any]], key: str, words: str) -> None:
    """Draw the speed-ups of some lines. words: the heading."""
    from scmoe.charts import BLUE, GREEN, ORANGE, chart, heading

    rivals = {
        "over_top2": ("over the sequential standard model", BLUE),
        "over_best": ("over the standard model at its best", GREEN),
        "over_best_shared": ("over shared-expert at its best", ORANGE),
    }
    with chart(PICTURE, 4.2) as figure:
        axis = figure.subplots()
        for number, (rival, (label, color)) in enumerate(rivals.items(), -1):
            xs = [x + 0.04 * number for x in range(len(lines))]  # whiskers stand side by side
            over = [line[rival] for line in lines.values()]
            ends = [line[f"{rival}_interval"] for line in lines.values()]
            below = [value - low for value, (low, _) in zip(over, ends, strict=True)]
            above = [high - value for value, (_, high) in zip(over, ends, strict=True)]
            line = {"color": color, "label": label, "capsize": 3, "linestyle": "--"}
            axis.errorbar(xs, over, (below, above), **line)
        axis.axhline(1.0, color="#888888", linewidth=0.8)
        axis.set_xticks(range(len(lines)), lines, rotation=20 if key == "cluster" else 0)
        axis.set(xlabel=key, ylabel="speed-up of a training step")
        axis.grid(axis="y")
        figure.legend(loc="outside lower left")
        heading(figure, words)
