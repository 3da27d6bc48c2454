"""`scmoe advise` says whether a shortcut would pay on a cluster, before anything is trained."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scmoe.command_line import KeyValue, numbers_of
from scmoe.config.leaves import ConfigError
from scmoe.predict.batches import InFlight
from scmoe.report import print_result

if TYPE_CHECKING:
    from scmoe.predict.advise import Advice
    from scmoe.predict.advised_rows import AdvisedRow, Slowdown
    from scmoe.predict.cluster import Profile
    from scmoe.predict.judged_job import Job, Request

PICTURE = Path("runs/advise.png")
NUMBERS = ("ranks", "ep", "samples", "stage_layers", "tensor_parallel")
CHOICES = {  # words with a set of values, the first one is the default
    "copies": ("expert", "node"),
    "wire": ("", "fp8"),
    "repeat_transfers": ("false", "true"),
    "prefill": ("false", "true"),
    "top1": ("false", "true"),
}
ADDED = {"two_batches": "two batches", "shared_expert": "shared expert", "shortcut": "shortcut"}
COLUMNS = {
    "EP": "{ep}",
    "runs as": "{way}",
    "ms": "{step_ms:.4g}",
    "waits": "{waits:.0%}",
    "tokens/s": "{tokens_s:,.0f}",
    "MFU": "{mfu:.0%}",
    "GiB": "{memory_gib:.1f}",
    "fits": "{fits_in_words}",
}
COLUMNS_OF_VERDICT = {
    "speed-up": "{value:.2f}",
    "90 %": "{interval[0]:.2f} {interval[1]:.2f}",
    "answer": "{answer}",
    "row": "{row}",
    "over": "{over}",
}


def main(config: str, /, *words: KeyValue) -> None:
    """Say whether a shortcut would pay on a cluster: every number of ranks that may share the
    experts is tried, each architecture at its best, and a verdict in three steps.

    The last line of standard output is JSON. Any one key may have several values, such as
    samples=1,2,4: a line each, and a picture in runs/advise.png.

    Args:
        config: a YAML file, or the name of a shipped one, such as gpt2_moe_medium
        words: cluster=NAME: a profile of configs/cluster, a file, or measure, which measures this
            machine. ranks=N (default: all of the cluster). ep=N: only this number of ranks shares
            the experts. samples=N of a rank in one batch (default: as CONFIG has it; a preset has
            16,384 tokens or 128 images in a step). measured_step_ms=MS of CONFIG with one batch in
            flight, sequential if it is standard top-k, or measured=FILE: a plan.json, a bench's
            report or a trace. stage_layers=N of a pipeline's stage, tensor_parallel=N, copies=node
            (one row of a token for each node), wire=fp8, repeat_transfers=true with
            trainer.recompute, prefill=true, top1=true, load=KIND, cluster.KEY=NUMBER, and
            key=value of CONFIG
    """
    listed = [word for word in words if is_list(word)]
    if len(listed) > 1:
        keys = " and ".join(word.partition("=")[0] for word in listed)
        raise ConfigError(f"command line: {keys} have several values each. Give one key a list")
    if listed:
        advise_each(config, words, listed[0])
        return
    asked = AskedAdvice(config, words)
    facts = asked.answer()
    show(facts)
    print_result(facts)


def is_list(word: str) -> bool:
    """Return whether a word gives its key several values. A list in brackets is one value."""
    value = word.partition("=")[2]
    return "," in value and not value.startswith(("[", "{"))


class AskedAdvice:
    """What some words ask for, and on which cluster. ConfigError: a word or name is wrong; it is
    said before torch is imported, where that is possible."""

    def __init__(self, config: str, words: Sequence[str]) -> None:
        self.config = config
        self.sizes, others = numbers_of(words, NUMBERS)
        self.named = {"cluster": "", "load": "balanced", "measured": "", "measured_step_ms": ""}
        self.chosen = {key: values[0] for key, values in CHOICES.items()}
        overrides: list[str] = []
        of_cluster: list[str] = []
        for word in others:
            key, _, value = word.removeprefix("--").partition("=")
            if key in self.named:
                self.named[key] = value
            elif key in CHOICES:
                self.choose(key, value)
            else:
                (of_cluster if key.startswith("cluster.") else overrides).append(word)
        if not self.named["cluster"]:
            from scmoe.predict.cluster import names

            raise ConfigError(
                f"command line: cluster is missing, allowed: {', '.join([*names(), 'measure'])}, or"
                " a YAML file"
            )
        self.measured_s = self.seconds_of("measured_step_ms")
        if self.measured_s and self.named["measured"]:
            raise ConfigError(
                "command line: measured and measured_step_ms are both given. Give one of the two."
            )
        if self.named["measured"] and not Path(self.named["measured"]).is_file():
            raise ConfigError(
                f"measured is {self.named['measured']}, which is not a file. Give a plan.json, a"
                " bench's report or a profiler's trace."
            )
        from scmoe.predict.asked_config import read_asked

        self.asked_config = read_asked(config, overrides)
        self.profile = profile_of(self.named["cluster"], of_cluster)

    def choose(self, key: str, value: str) -> None:
        if value not in CHOICES[key]:
            allowed = " | ".join(filter(None, CHOICES[key]))
            raise ConfigError(f"command line: {key} is {value}, allowed: {allowed}")
        self.chosen[key] = value

    def seconds_of(self, key: str) -> float | None:
        """Return the seconds of a word in milliseconds; None: it is not given."""
        text = self.named[key]
        if not text:
            return None
        try:
            milliseconds = float(text)
        except ValueError:
            milliseconds = 0.0
        if not 0 < milliseconds < float("inf"):
            raise ConfigError(f"command line: {key} is {text}, allowed: a number above 0")
        return 1e-3 * milliseconds

    def request(self) -> "Request":
        from scmoe.predict.judged_job import Request

        return Request(
            self.asked_config,
            self.sizes.get("ranks"),
            self.sizes.get("ep"),
            self.sizes.get("samples"),
            self.sizes.get("stage_layers"),
            self.sizes.get("tensor_parallel", 1),
            copies="node" if self.chosen["copies"] == "node" else "expert",
            wire="fp8" if self.chosen["wire"] == "fp8" else None,
            transfers_again=self.chosen["repeat_transfers"] == "true",
            prefill=self.chosen["prefill"] == "true",
            top1=self.chosen["top1"] == "true",
            load=self.named["load"],
        )

    def answer(self) -> dict[str, Any]:
        """Return the advice as JSON."""
        from scmoe.predict.advise import advise
        from scmoe.predict.compared_models import job_of, models_for
        from scmoe.report import console

        request = self.request()
        with console().status("counting each architecture") as status:  # on a terminal
            job = job_of(request, self.profile)
            models = models_for(job, self.profile, request.load, request.top1)
            status.update(f"playing steps with EP {', '.join(map(str, job.ep_sizes))}")
            scales = self.scales(job, models)
            advice = advise(models, self.profile, job, scales, bool(self.named["measured"]))
        return facts_of(self, job, advice, scales)

    def scales(self, job: "Job", models: Sequence[Any]) -> "list[Slowdown]":
        """Return what a measurement says; without one, that the profile's values are right."""
        from scmoe.predict.advised_rows import AS_IT_IS, Simulator
        from scmoe.predict.measured_times import known_choice, slowdown_of_file, slowdowns_of_step

        if not (self.measured_s or self.named["measured"]):
            return [AS_IT_IS]
        simulator = Simulator(self.profile.machine(), job)
        node = self.profile.ranks_per_node
        if self.measured_s:
            model, choice = known_choice(models, job, node)
            scales = slowdowns_of_step(simulator, model, choice, self.measured_s)
            # no machine is faster than its datasheet
            possible = [
                scale
                for scale in scales
                if all(share <= 1 for share in implied_by(scale, self.profile).values())
            ]
            return possible or scales
        return [slowdown_of_file(Path(self.named["measured"]), simulator, models, node)]


def profile_of(name: str, words: list[str]) -> "Profile":
    """Return a profile by name, or this machine's."""
    from scmoe.predict.cluster import overridden, read_profile

    return overridden(measured(), words) if name == "measure" else read_profile(name, words)


@cache
def measured() -> "Profile":
    """Return this machine's profile. It is measured once, also for a list of values."""
    from scmoe.predict.measure import measure

    return measure()


# ---------------------------------------------------------------------- the answer as JSON


def facts_of(
    asked: AskedAdvice, job: "Job", advice: "Advice", scales: "Sequence[Slowdown]"
) -> dict[str, Any]:
    """Return an advice as JSON."""
    from scmoe.predict.advise import tokens_of_batch

    profile = asked.profile
    return {
        "job": {
            "config": asked.config,
            "cluster": profile.name,
            "ranks": job.sizes.ranks * job.sizes.stages,
            "tokens": job.tokens,
            "unit": "images" if job.config.model.family == "swin" else "tokens",
            "samples": job.samples,
            "batches": job.accumulate,
            "tokens_of_batch": tokens_of_batch(advice.rows[advice.standard].model, job),
            "load": asked.named["load"],
            "prefill": job.prefill,
        },
        "verdict": {
            name: {
                "value": step.value,
                "interval": list(step.interval),
                "answer": step.answer,
                "row": step.row,
                "over": step.over,
            }
            for name, step in advice.verdict.items()
        },
        "to_do": advice.to_do,
        "ep": advice.rows[advice.standard].choice.ep_size,
        "ep_sizes": list(job.ep_sizes),
        "rows": {name: row_to_json(row, job, profile) for name, row in advice.rows.items()},
        "implied": [implied for scale in scales if (implied := implied_by(scale, profile))],
        "guesses": profile.guesses,
    }


def row_to_json(row: "AdvisedRow", job: "Job", profile: "Profile") -> dict[str, Any]:
    """Return a row's figures in milliseconds and GiB."""
    choice = row.choice
    step = row.step
    passes = 1 if job.prefill else 3
    groups = job.sizes.ranks / job.sizes.tensor_parallel
    flops = passes * row.model.flops * job.samples * job.accumulate * groups / job.sizes.ranks
    return {
        "step_ms": 1e3 * step.total,
        "tokens_s": job.tokens / step.total,
        "mfu": flops / step.total / (1e12 * profile.values["peak_tflops"].value),
        "waits": row.waits,
        "ep": choice.ep_size,
        "slot": choice.schedule.slot,
        "chunks": choice.schedule.chunks,
        **choice.batches.facts,
        "sequential": choice.sequential,
        "exposed_rows_ms": 1e3 * step.exposed_rows,
        "exposed_gradients_ms": 1e3 * step.exposed_gradients,
        "computing_ms": 1e3 * step.computing,
        "slowed_ms": 1e3 * step.slowed,
        "update_ms": 1e3 * step.update,
        "other_ms": 1e3 * step.other,
        "memory_gib": None if row.memory is None else row.memory / 2**30,
        "fits": row.fits,
    }


def implied_by(scale: "Slowdown", profile: "Profile") -> dict[str, float]:
    """Return which shares of the datasheet's rates a measurement implies."""
    implied = {}
    if scale.computing != 1:
        implied["attained"] = profile.values["attained"].value / scale.computing
    if scale.transfers != 1:
        for tier in ("node", "network"):
            key = f"links.{tier}.attained"
            if key in profile.values:
                implied[key] = profile.values[key].value / scale.transfers
    return implied


# ---------------------------------------------------------------------- showing it


def show(facts: Mapping[str, Any]) -> None:
    """Print an advice: its rows, the verdict, what to do, and what to know of this job."""
    from scmoe.predict.advise import FEW_TOKENS
    from scmoe.report import Report, say

    job = facts["job"]
    batches = f" in {job['batches']} batches" if job["batches"] > 1 else ""
    what = "a prompt's pass" if job["prefill"] else "a step"
    title = (
        f"{job['config']} on {job['cluster']}: {job['ranks']} ranks, {job['tokens']:,}"
        f" {job['unit']} in {what}{batches}, load {job['load']}. Predicted."
    )
    rows = {name: {**row, **in_words(row)} for name, row in facts["rows"].items()}
    columns = {name.replace("tokens", job["unit"]): each for name, each in COLUMNS.items()}
    Report(title, rows, columns, "row").show()
    verdict = {ADDED[name]: step for name, step in facts["verdict"].items()}
    Report("Verdict", verdict, COLUMNS_OF_VERDICT, "what is added").show()
    for implied in facts["implied"]:
        values = ", ".join(f"{key} {value:.2g}" for key, value in implied.items())
        say(f"The measurement implies {values} (of 1, the datasheet's rates).")
    of_a_batch = job["tokens_of_batch"]
    if of_a_batch < FEW_TOKENS:
        say(
            f"A rank has only {of_a_batch:,.0f} tokens in a batch. Launches and latency decide"
            " there, which no measurement checks, so the intervals are wide."
        )
    if facts["guesses"] and not facts["implied"]:
        say(f"guesses of this profile: {', '.join(facts['guesses'])}")
    say(facts["to_do"])


def in_words(row: Mapping[str, Any]) -> dict[str, str]:
    chunks = row["chunks"]
    way = "waits" if row["sequential"] else f"slot {row['slot']}"
    if chunks > 1:
        way += f", {chunks} chunks"
    way += InFlight.read(row).in_words
    fits = {True: "yes", False: "no", None: "?"}[row["fits"]]
    return {"way": way, "fits_in_words": fits}


# ---------------------------------------------------------------------- a list of values


def advise_each(config: str, words: Sequence[str], listed: str) -> None:
    """Print a line and the JSON of each value of the list in the word `listed`, and draw them."""
    from scmoe.config.installation import require
    from scmoe.report import Report, say

    require("scmoe advise with a list", "matplotlib")
    key, _, values = listed.removeprefix("--").partition("=")
    each = {
        value: AskedAdvice(config, [f"{key}={value}" if word == listed else word for word in words])
        for value in values.split(",")
    }
    facts = {value: asked.answer() for value, asked in each.items()}
    lines = {value: line_of(answer) for value, answer in facts.items()}
    columns = {"EP": "{ep}", "waits": "{waits:.0%}", "ms": "{step_ms:.4g}"}
    columns |= {words_of_step: f"{{{name}}}" for name, words_of_step in ADDED.items()}
    title = f"{config}, by {key}: the standard model, and what each step brings"
    Report(title, lines, columns, key).show()
    print_result({"key": key, "rows": lines, "values": facts})  # rows: what `scmoe report` shows
    try:
        draw(facts, key, f"{Path(config).stem}: what each step brings\nPrediction; whiskers: 90 %")
        say(f"picture: {PICTURE}")
    except OSError as error:
        say(f"warning: {PICTURE} is not written: {error.strerror or error}")


def line_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is shown of an advice beside others."""
    standard = next(iter(facts["rows"].values()))
    line = {"ep": standard["ep"], "waits": standard["waits"], "step_ms": standard["step_ms"]}
    for name, step in facts["verdict"].items():
        low, high = step["interval"]
        line[name] = f"{step['value']:.2f} [{low:.2f} {high:.2f}] {step['answer']}"
    return line


def draw(facts: Mapping[str, Mapping[str, Any]], key: str, words: str) -> None:
    """Draw the steps of some verdicts. words: the heading."""
    from scmoe.charts import BLUE, GREEN, ORANGE, chart, heading

    colors = dict(zip(ADDED, (BLUE, ORANGE, GREEN), strict=True))
    with chart(PICTURE, 4.2) as figure:
        axis = figure.subplots()
        for number, (name, label) in enumerate(ADDED.items(), -1):
            xs = [x + 0.04 * number for x in range(len(facts))]  # whiskers stand side by side
            steps = [each["verdict"][name] for each in facts.values()]
            below = [step["value"] - step["interval"][0] for step in steps]
            above = [step["interval"][1] - step["value"] for step in steps]
            line = {"color": colors[name], "label": label, "capsize": 3, "linestyle": "--"}
            axis.errorbar(xs, [step["value"] for step in steps], (below, above), **line)
        axis.axhline(1.0, color="#888888", linewidth=0.8)
        axis.set_xticks(range(len(facts)), facts, rotation=20 if key == "cluster" else 0)
        axis.set(xlabel=key, ylabel="speed-up of a step")
        axis.grid(axis="y")
        figure.legend(loc="outside lower left")
        heading(figure, words)
