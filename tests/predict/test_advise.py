"""The advice answers as it must where the answer is known, and refuses what it cannot answer."""

import json
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path

import pytest

from scmoe.command_line import call
from scmoe.loads import Sizes, load_of
from scmoe.parallel.dense.memory import rank_memory
from scmoe.predict import measure
from scmoe.predict.advise import WORTH, Errors, advise, verdict_of, what_to_do
from scmoe.predict.advised_rows import Choice, Simulator, best_rows
from scmoe.predict.asked_config import read_asked
from scmoe.predict.batches import InFlight
from scmoe.predict.cluster import overridden, read_profile
from scmoe.predict.compared_models import job_of, rank_shares
from scmoe.predict.judged_job import Request, job_in_batches
from scmoe.predict.measure import RankTimes
from scmoe.predict.measured_times import known_choice
from scmoe.schedule.schedule import Schedule
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.assembly.rank_job import rank_job
from tests.support.advised import QUICK_WORDS, counted_on, quickstart_on_cards

TERMS = ("computing", "slowed", "exposed_rows", "exposed_gradients", "update", "other")
EVERYTHING = ("two_batches", "shared_expert", "shortcut")


@pytest.fixture(scope="module")
def counted():
    return quickstart_on_cards()


def answers(counted, *words, ep_sizes=(8,), measured=False, **sizes):
    profile, job, models = counted
    chosen = overridden(profile, [f"cluster.{word}" for word in words])
    asked = job._replace(ep_sizes=ep_sizes, sizes=job.sizes._replace(**sizes))
    compared = [model for name, model in models.items() if name != "top1"]
    return advise(compared, chosen, asked, operators_measured=measured)


def test_where_rows_take_no_time_only_a_shared_expert_s_computing_differs(counted):
    free = ("links.node.gb_s=1e5", "links.node.attained=1", "links.node.latency_us=0")
    verdict = answers(counted, *free, "peer_us=0", "launch_us=0").verdict
    assert verdict["shortcut"].value == pytest.approx(1.0, abs=0.02)
    assert verdict["two_batches"].answer != "pays"


def test_hiding_rows_that_take_much_time_pays_once_a_measurement_says_so(counted):
    """Without one the error of predictions for other clusters leaves it open."""
    # with so many rows gradients take little of the link
    words = ("links.node.gb_s=64",)
    open_, sure = (
        answers(counted, *words, rows=64, measured=measured) for measured in (False, True)
    )
    assert open_.rows["top2"].waits > 0.4
    steps = [advice.verdict["two_batches"] for advice in (open_, sure)]
    assert [step.answer for step in steps] == ["within the error", "pays"]
    for step in steps:
        assert step.interval[0] < step.value < step.interval[1] and step.value > 1.1
    assert "run the standard model with the halves of a batch in flight" in sure.to_do


def test_the_steps_of_a_verdict_are_over_each_other(counted):
    """Their product is the best shortcut over the sequential standard model."""
    advice = answers(counted, "links.node.gb_s=64", rows=64)
    verdict = advice.verdict
    assert tuple(verdict) == EVERYTHING
    assert verdict["two_batches"].over == "top2"
    assert verdict["shared_expert"].over == verdict["two_batches"].row
    assert verdict["shortcut"].over == verdict["shared_expert"].row
    whole = 1.0
    for step in verdict.values():
        whole *= step.value
    best = min(row.total for name, row in advice.rows.items() if name.startswith("scmoe"))
    assert whole == pytest.approx(advice.rows["top2"].total / best)


def test_experts_stay_in_the_node_where_the_network_is_slow():
    """The answer for two machines is to keep EP 8 in the node."""
    profile = read_profile("2x8xA800", ["cluster.memory_gb=10"])
    job, models = counted_on(
        profile,
        Request(read_asked("gpt2_moe_small", ["model.layers=4"]), samples=8),
        *("top2", "shared_expert", "scmoe_pos2"),
    )
    fitting = [*models.values()]
    advice = advise(fitting, profile, job._replace(ep_sizes=(8, 16)))
    assert {row.choice.ep_size for row in advice.rows.values()} == {8}
    assert "Keep EP 8 in the node" in advice.to_do
    across = advise(fitting, profile, job._replace(ep_sizes=(16,)))
    assert across.rows["top2"].total > advice.rows["top2"].total


def test_every_number_of_ranks_that_divides_is_tried():
    job = job_of(
        Request(read_asked("gpt2_moe_small", ["model.layers=2"])), read_profile("2x8xA800")
    )
    assert job.config.moe.num_experts == 8 and job.ep_sizes == (1, 2, 4, 8)


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_a_row_has_the_best_of_all_slots_and_chunks(counted, rate):
    profile, job, models = counted
    job = job._replace(sizes=job.sizes._replace(rows=64), ep_sizes=(8,))
    chosen = overridden(profile, [f"cluster.links.node.gb_s={rate}"])
    simulator = Simulator(chosen.machine(), job)
    rows = best_rows([models["top2"], models["scmoe_pos2"]], simulator, None)
    steps = {}
    for slot, chunks in product(range(4), (1, 2, 4)):
        choice = Choice(8, Schedule("scmoe", "pos2", slot, chunks))
        steps[choice] = simulator.step(models["scmoe_pos2"], choice).total
    for slot, chunks in product(range(4), (1, 2)):
        choice = Choice(8, Schedule("scmoe", "pos2", slot, chunks), InFlight.HALVES)
        steps[choice] = simulator.step(models["scmoe_pos2"], choice).total
    assert rows["scmoe_pos2"].total == min(steps.values())


def test_other_time_is_added_to_every_step(counted):
    usual, longer = (answers(counted, f"other_ms={ms}").rows for ms in (0, 7))
    for name, row in longer.items():
        assert row.step.total == pytest.approx(usual[name].step.total + 0.007)


def test_the_host_s_time_is_that_of_each_block_and_batch_and_hides_nothing(counted):
    usual, longer = (answers(counted, f"fixed_ms={ms}").rows["top2"] for ms in (0, 3))
    blocks = 2  # two pairs
    assert longer.total - usual.total == pytest.approx(blocks * 0.003)


def test_stages_wait_for_each_other_s_batches(counted):
    one, four = (answers(counted, stages=n).rows["top2"].step for n in (1, 4))
    assert one.other == 0 < four.other
    assert four.computing == one.computing  # of the last stage, which has the head too


def test_a_choice_that_fits_is_better_than_a_faster_one(counted):
    profile, job, models = counted
    slow = overridden(profile, ["cluster.links.node.gb_s=0.5"])
    job = job._replace(sizes=job.sizes._replace(rows=64), ep_sizes=(8,))
    simulator = Simulator(slow.machine(), job)
    two = [models["top2"], models["shared_expert"]]
    needed = models["top2"].memory
    roomy = best_rows(two, simulator, None)
    assert {row.fits for row in roomy.values()} == {None}
    small = best_rows(two, simulator, needed(8, 2, InFlight.ONE))
    assert small["top2_pipelined"].choice.schedule.chunks == 2
    assert small["top2_pipelined"].fits is True
    none = best_rows(two, simulator, 1.0)
    assert {row.fits for row in none.values()} == {False}


def test_a_row_s_memory_is_the_estimate_s_of_its_own_schedule(counted):
    profile = counted[0]
    for name, row in answers(counted).rows.items():
        schedule = row.choice.schedule
        words = [
            *QUICK_WORDS,
            f"moe.architecture={schedule.architecture}",
            f"moe.position={schedule.position or 'pos2'}",
            f"moe.top_k={2 if name.startswith('top2') else 1}",
        ]
        again = job_in_batches(Request(read_asked("quickstart", words)), profile).config
        again = replace(again, schedule=replace(again.schedule, chunks=schedule.chunks))
        of_rank = rank_job(again)
        job = replace(of_rank, parts=row.choice.batches.number)
        assert row.memory == rank_memory(build_model_on_meta(again), job)["total"], name


def test_a_load_s_memory_is_that_of_the_busiest_rank_s_rows():
    profile = read_profile("8xH100")

    def memory(load):
        request = Request(read_asked("quickstart", ["moe.capacity_factor=null"]), load=load)
        job, models = counted_on(profile, request, "top2")
        return job, models["top2"].memory(8, 1, InFlight.ONE)

    job, even = memory("balanced")
    _, hot = memory("hot_rank:1.5")
    rows = 2 * job.config.data.seq_len * job.samples
    dim = job.config.model.dim
    # in and out of the experts; before and after their function; in bfloat16. Two blocks keep them
    kept = 2 * rows * (2 * dim + 2 * 4 * dim) * 2
    assert 0.5 * kept < hot - even < kept


def test_a_load_is_that_of_its_busiest_rank():
    load = rank_shares(load_of("hot_rank:1.5"), Sizes(8, 2, 4))
    (chunks,) = load(2)
    assert len(chunks) == 2
    for chunk in chunks:
        assert [round(share.computed, 2) for share in chunk] == [1.5, 0.83, 0.83, 0.83]
    assert rank_shares(load_of("hot_rank:1.0"), Sizes(8, 2, 1)) is None


def test_a_recorded_load_takes_the_mean_of_its_steps(counted):
    """Of one recorded step, both of its layers are a step of the load each."""
    profile, job, models = counted
    file = Path(__file__).parents[2] / "docs/figures/routing-quickstart.safetensors"
    sizes = Sizes(job.config.moe.num_experts, 1, 8)
    simulator = Simulator(profile.machine(), job)

    def step(load):
        dealt = rank_shares(load_of(load), sizes)
        model = replace(models["scmoe_pos2"], loads=lambda ep_size: dealt)
        return simulator.step(model, Choice(8, model.schedule))

    whole, first, second = (step(f"recorded:{file}:0{layer}") for layer in ("", ":0", ":1"))
    assert first.total != second.total
    assert astuple(whole) == pytest.approx(
        [(a + b) / 2 for a, b in zip(astuple(first), astuple(second), strict=True)]
    )


def test_the_layers_that_a_last_stage_lacks_make_room_for_its_head(counted):
    profile, job, models = counted

    def head_of(missing):
        sizes = job.sizes._replace(stages=2, missing=missing)
        simulator = Simulator(profile.machine(), job._replace(sizes=sizes))
        return simulator.blocks(models["top2"], 8)[1]

    all_, less, none = (head_of(missing) for missing in (0.0, 0.001, 1.0))
    assert all_.forward > less.forward > none.forward == 0
    assert all_.backward > less.backward > none.backward == 0


def test_a_stage_hands_over_in_the_host_s_fixed_time(counted):
    """Once for each virtual stage and batch; a model that is not cut hands nothing over."""

    def added(**stages):
        slow, quick = (
            answers(counted, f"fixed_ms={ms}", **stages).rows["top2"].step.computing
            for ms in (3, 0)
        )
        return slow - quick

    batches = counted[1].accumulate
    assert added(stages=4) - added() == pytest.approx(batches * 3e-3)
    assert added(stages=4, virtual_stages=2) - added() == pytest.approx(2 * batches * 3e-3)


def test_a_shortcut_that_beats_a_slow_shared_expert_alone_is_not_advised(counted):
    profile, job, _ = counted
    advice = answers(counted)
    rows = {name: row for name, row in advice.rows.items() if not name.endswith("_two")}
    slow = replace(rows["shared_expert"].step, other=10.0)
    less_slow = replace(rows["scmoe_pos2"].step, other=5.0)
    rows = {
        "top2": rows["top2"],
        "shared_expert": replace(rows["shared_expert"], step=slow),
        "scmoe_pos2": replace(rows["scmoe_pos2"], step=less_slow),
    }
    verdict = verdict_of(rows, "top2", Errors(0.0, 0.06))
    assert verdict["shortcut"].answer == "pays"
    assert "shortcut" not in what_to_do(rows, verdict, "top2", profile, job)


# ---------------------------------------------------------------------- the verb


def test_the_verb_answers_in_one_line_of_json(capfd):
    words = ("advise", "quickstart", "cluster=8xA30-PCIe", "moe.capacity_factor=null")
    words += ("strategy.wire_dtype=bfloat16", "model.layers=2", "samples=4")
    words += ("data.global_batch_size=64", "load=hot_rank:1.7", "cluster.other_ms=2")
    assert call(*words, "ranks=4", "ep=4") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    job = facts["job"]
    assert (job["config"], job["cluster"], job["load"]) == (
        "quickstart",
        "8xA30-PCIe",
        "hot_rank:1.7",
    )
    assert (job["ranks"], facts["ep"], job["batches"]) == (4, 4, 4)
    assert job["tokens"] == 64 * 256
    assert len(facts["rows"]) <= 8 and next(iter(facts["rows"])) == "top2"
    assert tuple(facts["verdict"]) == EVERYTHING
    for step in facts["verdict"].values():
        low, high = step["interval"]
        assert low <= step["value"] <= high
        pays = low > WORTH
        assert step["answer"] == ("pays" if pays else step["answer"])
        assert (step["answer"] == "does not pay") == (high < WORTH)
    for row in facts["rows"].values():
        assert sum(row[f"{term}_ms"] for term in TERMS) == pytest.approx(row["step_ms"])
        assert row["other_ms"] == 2 and row["fits"] is True
        assert row["tokens_s"] == pytest.approx(job["tokens"] / row["step_ms"] * 1e3)
        assert 0 < row["mfu"] < 1
    assert "Verdict" in err and facts["to_do"] in err
    assert max(len(line) for line in err.splitlines() if line.startswith("│")) <= 100


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
    words = ("advise", "quickstart", "cluster=8xH100", "model.layers=2", "ep=8")
    words += ("data.global_batch_size=32",)
    assert call(*words, "samples=1,4") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert facts["key"] == "samples"
    of_jobs = {value: each["job"]["samples"] for value, each in facts["values"].items()}
    assert of_jobs == {"1": 1, "4": 4}
    assert facts["values"]["1"]["rows"] != facts["values"]["4"]["rows"]
    assert (tmp_path / "runs/advise.png").stat().st_size > 10_000 and "runs/advise.png" in err
    assert call(*words, "samples=1,4", "ranks=4,8") == 2, "one key alone"


def test_a_picture_that_cannot_be_written_costs_no_advice(monkeypatch, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()  # a file where the folder would be
    words = ("cluster=8xH100", "model.layers=2", "ep=8", "data.global_batch_size=32")
    assert call("advise", "quickstart", *words, "samples=1,1") == 0
    out, err = capfd.readouterr()
    assert json.loads(out.splitlines()[-1])["values"].keys() == {"1"}
    assert "runs/advise.png is not written" in err and "picture: " not in err


def test_a_job_of_which_nothing_fits_is_told_what_needs_less(capfd):
    words = ("cluster=8xA30-PCIe", "model.layers=2", "samples=1", "cluster.memory_gb=0.01")
    assert call("advise", "quickstart", *words, "ep=8") == 0
    out, err = capfd.readouterr()
    facts = json.loads(out.splitlines()[-1])
    assert {row["fits"] for row in facts["rows"].values()} == {False}
    assert facts["to_do"].startswith("Make it fit first") and facts["to_do"] in err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("moe.every=1",), "farskip"),
        (("prefill=true", "samples=4"), "top2_two"),
        *(
            pytest.param(words, key, marks=pytest.mark.faults)
            for words, key in (
                (("copies=node", "wire=fp8", "cluster.kernels=fused", "top1=true"), "top1"),
                (
                    ("strategy.dense=sharded", "trainer.recompute=true", "repeat_transfers=true"),
                    "top2",
                ),
                (("stage_layers=2", "tensor_parallel=2"), "scmoe_pos2"),
            )
        ),
    ],
    ids=str,
)
def test_jobs_as_people_have_them(words, key, capfd):
    layers = "model.layers=4" if "stage_layers=2" in words else "model.layers=2"
    usual = ("cluster=2x8xA800", layers, "data.global_batch_size=128")
    assert call("advise", "quickstart", *usual, *words, "ep=8") == 0
    facts = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert key in facts["rows"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("cluster=9xA30",),
        ("cluster=8xA30-PCIe", "ranks=16"),
        ("cluster=8xA30-PCIe", "cluster.taxes=1"),
        ("cluster=8xA30-PCIe", "cluster.kernels=quick"),
        ("cluster=8xA30-PCIe", "trainer.precision=32-true"),
        ("cluster=8xA30-PCIe", "ep=3"),
        ("cluster=8xA30-PCIe", "copies=rank"),
        ("cluster=8xA30-PCIe", "stage_layers=5"),
        ("cluster=8xA30-PCIe", "tensor_parallel=3"),
        ("cluster=8xA30-PCIe", "measured_step_ms=-1"),
        ("cluster=8xA30-PCIe", "measured=no.json"),
        ("cluster=8xA30-PCIe", "repeat_transfers=true"),  # nothing is computed again
        ("cluster=8xA30-PCIe", "prefill=true", "trainer.accumulate=2"),
        ("cluster=8xA30-PCIe", "samples=1", "trainer.accumulate=2"),
        ("cluster=8xA30-PCIe", "strategy.dense=hybrid"),
        ("cluster=8xA30-PCIe", "load=hot_rank:9", "moe.capacity_factor=null"),
        ("cluster=8xA30-PCIe", "load=hot_rank:1.7"),  # every slot of a capacity travels
        ("cluster=8xA30-PCIe", "strategy.ep_size=8"),  # ep=8 is meant
        ("cluster=8xA30-PCIe", "trainer.accumulate=0"),
        ("cluster=8xA30-PCIe", "moe.architecture=dgmoe"),
        ("cluster=8xA30-PCIe", "moe.architecture=top_k", "moe.top_k=1"),
        ("cluster=8xA30-PCIe", "moe.num_experts=2", "moe.top_k=2"),
        ("cluster=8xA30-PCIe", "optim.name=muon"),
        ("cluster=8xA30-PCIe", "schedule.batches_in_flight=1"),  # one and two are compared
        ("cluster=8xA30-PCIe", "schedule.slot=1"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(words, capfd):
    assert call("advise", "quickstart", *words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_load_that_one_ep_cannot_have_says_how_to_try_another_one(capfd):
    """Of two ranks none has three times the mean."""
    words = ("cluster=8xA30-PCIe", "load=hot_rank:3", "moe.capacity_factor=null")
    assert call("advise", "quickstart", *words) == 2
    assert "with 2 ranks: 1 to 2. To try another EP alone, give ep=N" in capfd.readouterr().err


def test_a_row_of_a_token_for_each_node_is_counted_with_the_copies_of_each_model():
    """Top-2's copies are on 1.5 of two nodes on average; one copy is always one row."""
    profile = read_profile("2x8xA800", ["cluster.links.node.gb_s=1e5", "cluster.peer_us=0"])
    words = ["model.layers=2", "moe.capacity_factor=null", "moe.num_experts=16"]
    seconds = {}
    for copies in ("expert", "node"):
        request = Request(
            read_asked("gpt2_moe_small_tiny", words), ep_size=16, samples=8, copies=copies
        )
        job, models = counted_on(profile, request, "top2", "shared_expert")
        simulator = Simulator(profile.machine(), job)
        for name in ("top2", "shared_expert"):
            blocks, _ = simulator.blocks(models[name], 16)
            latency = blocks[0].fixed.forward["dispatch"]
            seconds[copies, name] = blocks[0].times.forward["dispatch"] - latency
    assert seconds["node", "top2"] == pytest.approx(0.75 * seconds["expert", "top2"])
    assert seconds["node", "shared_expert"] == pytest.approx(seconds["expert", "shared_expert"])


def test_split_weights_are_gathered_with_every_batch(counted):
    """Four batches expose four times what one does where the link carries nothing else."""
    profile, job, models = counted
    exposed = {}
    for accumulate in (1, 4):
        training = replace(job.training, accumulate=accumulate)
        sizes = job.sizes._replace(split=True)
        asked = job._replace(training=training, sizes=sizes, ep_sizes=(8,))
        simulator = Simulator(profile.machine(), asked)
        model = models["top2"]
        step = simulator.step(model, Choice(8, model.schedule, sequential=True))
        exposed[accumulate] = step.exposed_gradients
    assert exposed[4] == pytest.approx(4 * exposed[1])


def test_six_ranks_are_not_in_a_node_of_eight(counted):
    """Ranks 6 to 11 are on two nodes."""
    _, job, models = counted
    compared = [models["top2"], models["shared_expert"], models["scmoe_pos2"]]
    sizes = job.sizes._replace(ranks=24)
    on_three = job._replace(ep_sizes=(1, 2, 3, 4, 6, 12), sizes=sizes, trained_ep_size=None)
    assert known_choice(compared, on_three, 8)[1].ep_size == 4
    profile = read_profile("4x8xH200-InfiniBand")
    said = [advise(compared, profile, on_three._replace(ep_sizes=(n,))).to_do for n in (4, 6)]
    assert "in the node" in said[0] and "in the node" not in said[1]


def test_the_advice_of_a_list_of_values_can_be_reported(monkeypatch, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    words = ("cluster=8xH100", "model.layers=2", "ep=8", "data.global_batch_size=32")
    assert call("advise", "quickstart", *words, "samples=1,4") == 0
    Path("advice.json").write_text(capfd.readouterr().out, encoding="utf-8")
    assert call("report", "advice.json") == 0
    assert "two batches" in Path("report.html").read_text(encoding="utf-8")
