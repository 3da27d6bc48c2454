"""`scmoe advise` says whether a shortcut would pay on a cluster, before anything is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.leaves import ConfigError
from scmoe.report import print_result

if TYPE_CHECKING:
    from scmoe.predict.advise import Row
    from scmoe.predict.profile import Profile

FEW_TOKENS = 4096
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
LEGEND = (
    "exposed: waiting for rows + sums of gradients, in ms. Speed-ups: / top-k is over the"
    " sequential standard model; / shared over shared-expert with one batch in flight; / best over"
    " the best row of the standard model, for its own rows over the sequential one; / best shared"
    " over the best row of shared-expert. GiB: an upper bound for the row's own chunks, batches in"
    " flight and load. Everything is predicted."
)


def main(config: str, /, *words: KeyValue, curves: str | None = None) -> None:
    """Say whether a shortcut would pay on a cluster: each architecture's step by simulation, with
    an interval, and an answer. Nothing is trained.

    The last line of standard output is JSON.

    Args:
        config: a YAML file, or the name of a shipped one, such as gpt2_moe_medium
        words: cluster=NAME: a profile of configs/cluster, a file, or measure, which measures this
            machine. ranks=N (default: all ranks of the cluster). ep=N: ranks that share the experts
            (default: the largest number that divides ranks and experts). samples=N of a rank in one
            batch (default: as CONFIG has it; a preset has 16,384 tokens or 128 images in a step,
            in as few batches as fit the card). load=KIND: uneven routing, as `scmoe bench` has it.
            cluster.KEY=NUMBER: a value of the profile. key=value: an override of CONFIG
        curves: a folder for pictures of the speed-up over bandwidth, EP, width, tokens and load
    """
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
    from scmoe.report import Report, console, say

    with console().status("counting and simulating each architecture"):  # on a terminal
        from scmoe.predict.advice import Request, advice_for, with_batch_of

        request = Request(
            config,
            overrides,
            sizes.get("ranks"),
            sizes.get("ep"),
            sizes.get("samples"),
            named["load"],
        )
        advice, settings = advice_for(request, profile)
    rows = {name: row_to_json(row) for name, row in advice.rows.items()}
    trainer = settings.trainer
    ranks = trainer.devices * trainer.num_nodes
    in_batches = f" ({trainer.accumulate} batches)" if trainer.accumulate > 1 else ""
    title = (
        f"{config} on cluster {profile.name}: {ranks} ranks, EP {settings.strategy.ep_size},"
        f" {advice.tokens:,} tokens of a rank in a step{in_batches}, load {named['load']}"
    )
    shown = {name: {**row, "gib": memory_in_words(row, profile)} for name, row in rows.items()}
    Report(title, shown, COLUMNS, "row").show()
    say(LEGEND)
    for name, row in advice.rows.items():
        say(f"{name}: {row.answer}. {row.why}")
    if ranks > 1 and settings.strategy.ep_size == 1 and "ep" not in sizes:
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
    if curves is not None:
        from scmoe.predict.advice_curves import draw_curves

        for path in draw_curves(with_batch_of(settings, request), profile, Path(curves)):
            say(f"curve: {path}")
    facts: dict[str, Any] = {
        "job": {
            "config": config,
            "cluster": profile.name,
            "ranks": ranks,
            "ep": settings.strategy.ep_size,
            "tokens": advice.tokens,
            "batches": trainer.accumulate,
            "load": named["load"],
            "standard": advice.standard,
            "share": advice.share,
        },
        "rows": rows,
        "standard": advice.standard,
        "best_without_another_model": advice.best,
        "carried_by": advice.tier,
        "guesses": profile.guesses,
    }
    print_result(facts)


def profile_of(name: str, words: list[str]) -> "Profile":
    """Return a profile by name, or this machine's."""
    from scmoe.predict.profile import overridden, read_profile

    if name != "measure":
        return read_profile(name, words)
    from scmoe.predict.measure import measure

    return overridden(measure(), words)


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
