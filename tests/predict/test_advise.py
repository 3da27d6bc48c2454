"""The advice answers as it must where the answer is known, and refuses what it cannot answer."""

import json
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import pytest

from scmoe.command_line import call
from scmoe.loads import Sizes as Routed
from scmoe.loads import load_of
from scmoe.parallel.dense.memory import rank_memory
from scmoe.predict import measure
from scmoe.predict.advice import Request, config_for, job_of, job_that_fits, models_for
from scmoe.predict.advise import advise, decisive
from scmoe.predict.measure import RankTimes
from scmoe.predict.plan import Choice, Plan, Simulator
from scmoe.predict.profile import overridden, read_profile
from scmoe.predict.rank_shares import rank_shares
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.assembly.rank_job import rank_job
from tests.support.advised import QUICK, quickstart_on_cards

TERMS = ("computing", "slowed", "exposed_rows", "exposed_gradients", "update", "other")


@pytest.fixture(scope="module")
def counted():
    return quickstart_on_cards()


def answers(counted, *words, **job):
    profile, config, models = counted
    chosen = overridden(profile, [f"cluster.{word}" for word in words])
    setting = replace(job_of(config), **job)
    return advise(list(models.values()), chosen, setting, "top2")


def test_where_rows_take_no_time_a_shortcut_gains_nothing_over_shared_expert(counted):
    free = ("links.node.gb_s=1e5", "links.node.attained=1", "links.node.latency_us=0")
    rows = answers(counted, *free, "peer_us=0", "launch_us=0").rows
    assert rows["scmoe_pos2"].over_best_shared == pytest.approx(1.0, abs=0.02)
    assert rows["top2"].answer == "baseline"


def test_where_rows_take_nearly_all_time_it_pays(counted):
    sizes = job_of(counted[1]).sizes._replace(rows=64)  # gradients take little of the link
    rows = answers(counted, "links.node.gb_s=0.5", sizes=sizes).rows
    assert rows["scmoe_pos2"].answer == "pays" and rows["scmoe_pos2"].over_standard > 1.3
    low, high = rows["scmoe_pos2"].over_best_interval
    assert low <= rows["scmoe_pos2"].over_best <= high
    assert "Waiting for rows takes" in rows["scmoe_pos2"].why


def test_where_a_rank_has_few_tokens_it_does_not_pay(counted):
    """The shared expert's own gradients and update cost more than is hidden."""
    sizes = job_of(counted[1]).sizes._replace(rows=1 / 64)
    rows = answers(counted, "launch_us=0", "links.node.latency_us=0", "peer_us=0", sizes=sizes).rows
    assert rows["scmoe_pos2"].answer == "does not pay"
    assert "tokens a step" in rows["scmoe_pos2"].why


def test_where_every_value_is_given_the_simulator_s_own_error_is_left(counted):
    words = [f"{key}={value.value}" for key, value in counted[0].values.items()]
    rows = answers(counted, *words).rows.values()
    unsure = [row for row in rows if row.answer == "within the error"]
    assert unsure and all("own error" in row.why for row in unsure)


def test_the_decisive_value_is_that_of_the_speed_up_that_decides_the_answer(counted):
    """Rows of the standard model are judged by the sequential one, not by the best of them."""
    profile, config, models = counted
    unsure = {"peak_tflops", "links.node.attained"}
    words = [f"cluster.{key}={value.value}" for key, value in profile.values.items()]
    chosen = overridden(profile, [word for word in words if word[8:].split("=")[0] not in unsure])
    job = job_of(config)
    job = replace(job, sizes=job.sizes._replace(rows=64), two=False)  # chunks gain something
    plan = Plan([models["top2"]], chosen, job, "top2")
    assert decisive("top2_pipelined", plan) == "links.node.attained"
    assert decisive("top2", plan) is None


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_a_row_has_the_best_of_all_slots_and_chunks(counted, rate):
    profile, config, models = counted
    job = replace(job_of(config), sizes=job_of(config).sizes._replace(rows=64))
    chosen = overridden(profile, [f"cluster.links.node.gb_s={rate}"])
    rows = answers(counted, f"links.node.gb_s={rate}", sizes=job.sizes).rows
    simulator = Simulator(chosen.machine(), job)
    for name, batches, chunks in (("scmoe_pos2", 1, (1, 2, 4, 8)), ("scmoe_pos2_two", 2, (1, 2))):
        steps = {}
        for slot, parts in product(range(4), chunks):
            schedule = Schedule("scmoe", "pos2", slot, parts)
            choice = Choice(schedule, batches, sequential=False)
            steps[schedule] = simulator.step(models["scmoe_pos2"], choice).total
        assert rows[name].step.total == min(steps.values())
        assert steps[rows[name].choice.schedule] == min(steps.values())


def test_other_time_is_added_to_every_step(counted):
    usual, longer = (answers(counted, f"other_ms={ms}").rows for ms in (0, 7))
    for name, row in longer.items():
        assert row.step.total == pytest.approx(usual[name].step.total + 0.007)


def test_a_row_that_does_not_fit_the_card_does_not_pay(counted):
    """Whatever its speed-up; its reason begins with the memory."""
    slow = ("links.node.gb_s=0.5",)
    sizes = job_of(counted[1]).sizes._replace(rows=64)
    roomy = answers(counted, *slow, sizes=sizes).rows
    assert roomy["scmoe_pos2"].answer == "pays" and roomy["scmoe_pos2"].fits
    small = answers(counted, *slow, "memory_gb=0.01", sizes=sizes).rows
    for name, row in small.items():
        assert row.fits is False and row.why.startswith("It needs 0.1 GiB, the card has 0.0.")
        assert row.answer == ("baseline" if name == "top2" else "does not pay")
    assert small["scmoe_pos2"].over_best == pytest.approx(roomy["scmoe_pos2"].over_best)


def test_a_row_runs_in_chunks_that_fit_and_beside_rows_that_fit(counted):
    profile, config, models = counted
    slow = overridden(profile, ["cluster.links.node.gb_s=0.5"])
    sizes = job_of(config).sizes._replace(rows=64)
    job = replace(job_of(config), sizes=sizes)
    needed = models["top2"].memory
    two = [models["top2"], models["top1"]]
    roomy = Plan(two, slow, job, "top2")
    assert max(choice.schedule.chunks for choice in roomy.choices["top2_pipelined"]) > 2
    in_two_chunks = replace(slow, memory_gb=needed(2, 1) / 1e9)
    plan = Plan(two, in_two_chunks, job, "top2")
    assert {choice.schedule.chunks for choice in plan.choices["top2_pipelined"]} == {2}
    assert plan.fits["top2_pipelined"] and plan.of_standard() == roomy.of_standard()
    in_one_piece = replace(slow, memory_gb=needed(1, 1) / 1e9)
    plan = Plan(two, in_one_piece, job, "top2")
    assert not plan.fits["top2_pipelined"] and plan.rivals("top1") == ["top2"]
    unknown = Plan(two, replace(slow, memory_gb=None), job, "top2")
    assert {*unknown.fits.values()} == {None}
    assert unknown.choices == roomy.choices


def test_a_row_s_memory_is_the_estimate_s_of_its_own_schedule(counted):
    profile, _, models = counted
    for name, row in answers(counted).rows.items():
        schedule = row.choice.schedule
        words = [
            f"moe.architecture={schedule.architecture}",
            f"moe.position={schedule.position or 'pos2'}",
            f"moe.top_k={2 if name.startswith('top2') else 1}",
            f"schedule.chunks={schedule.chunks}",
        ]
        again = config_for(replace(QUICK, overrides=[*QUICK.overrides, *words]), profile)
        job = replace(rank_job(again), batches_in_flight=row.choice.batches_in_flight)
        assert row.memory == rank_memory(build_model_on_meta(again), job)["total"], name
    memory = models["top2"].memory
    assert memory(1, 1) < memory(2, 1) == memory(1, 2) < memory(8, 1)


def test_a_load_s_memory_is_that_of_the_busiest_rank_s_rows():
    profile = read_profile("8xH100")

    def memory(load):
        request = Request("quickstart", ["moe.capacity_factor=null"], load=load)
        config = config_for(request, profile)
        return config, models_for(request, profile, config)[0].memory(1, 1)

    config, even = memory("balanced")
    _, hot = memory("hot_rank:1.5")
    rows = 2 * config.data.seq_len * rank_job(config).samples
    dim = config.model.dim
    # in and out of the experts; before and after their function; in bfloat16. Two blocks keep them
    kept = 2 * rows * (2 * dim + 2 * 4 * dim) * 2
    assert 0.5 * kept < hot - even < kept


def test_a_load_is_that_of_its_busiest_rank():
    load = rank_shares(load_of("hot_rank:1.5"), Routed(8, 2, 4))
    (chunks,) = load(2)
    assert len(chunks) == 2
    for chunk in chunks:
        assert [round(share.computed, 2) for share in chunk] == [1.5, 0.83, 0.83, 0.83]
    assert rank_shares(load_of("hot_rank:1.0"), Routed(8, 2, 1)) is None


def test_a_recorded_load_takes_the_mean_of_its_steps(counted):
    """Of one recorded step, both of its layers are a step of the load each."""
    profile, config, models = counted
    file = Path(__file__).parents[2] / "docs/figures/routing-quickstart.safetensors"
    sizes = Routed(config.moe.num_experts, 1, 8)
    simulator = Simulator(profile.machine(), job_of(config))

    def step(load):
        model = replace(models["scmoe_pos2"], loads=rank_shares(load_of(load), sizes))
        return simulator.step(model, Choice(model.schedule, 1, False))

    whole, first, second = (step(f"recorded:{file}:0{layer}") for layer in ("", ":0", ":1"))
    assert first.total != second.total
    assert astuple(whole) == pytest.approx(
        [(a + b) / 2 for a, b in zip(astuple(first), astuple(second), strict=True)]
    )


def test_the_step_of_a_preset_is_in_as_few_batches_as_fit():
    profile = read_profile("8xA30-PCIe", [])
    request = Request("gpt2_moe_small", ["model.layers=2"])
    config, models = job_that_fits(request, profile)
    assert config.trainer.accumulate == 1
    needed = max(model.memory(1, 1) for model in models)
    less = overridden(profile, [f"cluster.memory_gb={0.7 * needed / 1e9}"])
    other, smaller = job_that_fits(request, less)
    assert other.trainer.accumulate == 2
    assert other.data.global_batch_size == config.data.global_batch_size
    assert max(model.memory(1, 1) for model in smaller) <= less.memory
    given = replace(request, samples=16)
    assert job_that_fits(given, less)[0].trainer.accumulate == 1, "what is given is kept"


def test_the_verb_answers_in_one_line_of_json(capfd):
    """What runs on the ranks of the cluster may be refused on those of the config."""
    words = ("advise", "quickstart", "cluster=8xA30-PCIe", "moe.capacity_factor=null")
    words += ("strategy.wire_dtype=bfloat16", "trainer.accumulate=64", "samples=4")
    words_of_job = ("quickstart", "8xA30-PCIe", "hot_rank:1.7")
    assert call(*words, "load=hot_rank:1.7", "cluster.other_ms=2", "ranks=4", "ep=4") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    job = facts["job"]
    assert (job["config"], job["cluster"], job["load"]) == words_of_job
    assert (job["ranks"], job["ep"], job["standard"]) == (4, 4, "top2")
    assert job["tokens"] == 64 * 4 * 256
    standard = facts["rows"]["top2"]
    assert job["share"] == pytest.approx(standard["exposed_rows_ms"] / standard["step_ms"])
    assert {"top2", "top2_two", "shared_expert", "scmoe_pos3", "scmoe_pos3_two"} <= {*facts["rows"]}
    for row in facts["rows"].values():
        assert row["interval"][0] <= row["step_ms"] <= row["interval"][1]
        assert row["answer"] and row["why"] and row["over_top2"] > 0 < row["over_shared"]
        assert sum(row[f"{term}_ms"] for term in TERMS) == pytest.approx(row["step_ms"])
        assert row["other_ms"] == 2 and row["fits"] is True
    assert "4 ranks, EP 4" in err


def test_the_verb_measures_this_machine(monkeypatch, capfd):
    seconds = RankTimes(product=0.1, copy=0.02, launches=1e-4, small=1e-3, large=2e-2)
    monkeypatch.setattr(measure, "ranks_here", lambda: (False, 2))
    monkeypatch.setattr(measure, "measured_by", lambda ranks: [seconds] * ranks)
    words = ("cluster=measure", "model.layers=2", "cluster.links.node.latency_us=5")
    assert call("advise", "quickstart", *words) == 0
    out, _ = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert (facts["job"]["cluster"], facts["job"]["ranks"]) == ("measure", 2)
    assert {row["fits"] for row in facts["rows"].values()} == {True}
    assert {"attention", "halves"} <= {*facts["guesses"]}
    assert not {"memory_gb_s", "links.node.gb_s", "tax"} & {*facts["guesses"]}


def test_a_list_of_values_has_the_advice_of_each_and_a_picture(monkeypatch, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    words = ("advise", "quickstart", "cluster=8xH100", "model.layers=2")
    assert call(*words, "samples=1,4") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert facts["key"] == "samples" and {*facts["values"]} == {"1", "4"}
    assert (tmp_path / "runs/advise.png").stat().st_size > 10_000 and "runs/advise.png" in err
    assert call(*words, "samples=4") == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == facts["values"]["4"]
    assert call(*words, "samples=1,4", "ranks=4,8") == 2, "one key alone"


def test_a_job_of_which_nothing_fits_is_told_what_needs_less(capfd):
    words = ("cluster=8xA30-PCIe", "model.layers=2", "samples=1", "cluster.memory_gb=0.01")
    assert call("advise", "quickstart", *words) == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert {row["fits"] for row in facts["rows"].values()} == {False}
    assert " > 0.0" in err and "trainer.recompute=true" in err


@pytest.mark.parametrize("samples", [1, 2])
def test_rows_that_a_batch_of_one_sample_cannot_have_are_missed_in_words(samples, capfd):
    ranks = 2 + samples  # only the second number of ranks can share 8 experts
    words = ("cluster=8xA30-PCIe", "model.layers=2", f"samples={samples}", f"ranks={ranks}")
    assert call("advise", "quickstart", *words) == 0
    out, err = capfd.readouterr()
    has_two = any(name.endswith("_two") for name in json.loads(out.splitlines()[-1])["rows"])
    assert has_two == (samples == 2) == ("cannot be halved" not in err)
    assert ("EP is 1, as no larger number divides 3 ranks" in err) == (ranks == 3)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("cluster=9xA30",),
        ("cluster=8xA30-PCIe", "ranks=16"),
        ("cluster=8xA30-PCIe", "cluster.taxes=1"),
        ("cluster=8xA30-PCIe", "trainer.precision=32-true"),
        ("cluster=8xA30-PCIe", "ep=3"),
        ("cluster=8xA30-PCIe", "strategy.dense=sharded"),
        ("cluster=8xA30-PCIe", "load=hot_rank:9", "moe.capacity_factor=null"),
        ("cluster=8xA30-PCIe", "load=hot_rank:1.7"),  # every slot of a capacity travels
        ("cluster=8xA30-PCIe", "strategy.ep_size=8"),  # ep=8 is meant
        ("cluster=8xA30-PCIe", "trainer.accumulate=0"),
        ("cluster=8xA30-PCIe", "moe.architecture=dgmoe"),
        ("cluster=8xA30-PCIe", "moe.architecture=top_k", "moe.top_k=1"),
        ("cluster=8xA30-PCIe", "moe.num_experts=2", "moe.top_k=2"),
        ("cluster=8xA30-PCIe", "optim.name=muon"),
        ("cluster=8xA30-PCIe", "schedule.batches_in_flight=1"),  # one and two are compared
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(words, capfd):
    assert call("advise", "quickstart", *words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
