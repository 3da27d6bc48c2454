"""The curves of `scmoe advise --curves` agree with the advice, and a dot stands where transfers of
that size were measured, nowhere else."""

from dataclasses import replace

import pytest

from scmoe.config.fields import Config
from scmoe.config.load import SHIPPED
from scmoe.loads import Sizes as Routed
from scmoe.loads import load_of
from scmoe.predict import curves as drawing
from scmoe.predict.advice import Request, config_for, job_of, models_for
from scmoe.predict.advice_curves import compared, curves, draw_curves, wider
from scmoe.predict.advise import advise
from scmoe.predict.curves import basis, is_measured
from scmoe.predict.measure import LARGE, SMALL, Seconds, profile_of
from scmoe.predict.plan import Job, Model
from scmoe.predict.profile import Profile, overridden, parse_profile, read_profile
from scmoe.predict.rank_shares import rank_shares

RANKS, DIM, BYTES = 8, 192, 2  # of the quickstart on the clusters below, in bfloat16
TOKENS = 2048  # of a rank in a step, by eight samples of 256
REQUEST = Request("quickstart", ["model.layers=2", "moe.capacity_factor=null"], samples=8)
OWN = {"bandwidth": 450.0, "ep": RANKS, "tokens": TOKENS, "width": DIM, "load": 1.0}  # on 8xH100
WORDS = [f"links.node.{word}" for word in ("gb_s=100", "latency_us=20", "attained=0.9")]
WORDS.append("peer_us=5")
RATE = 100e9  # of the measured links


def request_on(profile: Profile) -> tuple[Config, list[Model], Job]:
    """Return the config of the request on a cluster, the models of a curve, and their job."""
    config = config_for(REQUEST, profile)
    return config, compared(models_for(REQUEST, profile, config)), job_of(config)


@pytest.fixture(scope="module")
def measured():
    """Return eight cards whose exchanges of SMALL and LARGE bytes were measured, and a request."""
    small, large = (nbytes * (RANKS - 1) / RANKS / RATE + 2e-5 for nbytes in (SMALL, LARGE))
    card = Seconds(2.75e-4, 2e-4, 3e-6, small, large, lost=0.01, hidden=0.1)
    profile = profile_of([card] * RANKS, True, None)
    _, models, job = request_on(profile)
    return profile, models, job


@pytest.fixture(scope="module")
def shipped():
    """Return a cluster of which nothing is measured, the advice, and all curves by name."""
    profile = read_profile("8xH100")
    config, models, job = request_on(profile)
    drawn = curves(REQUEST, profile, config, models)
    advice = advise(models, profile, job, "top2")
    return profile, advice, {curve.name: curve for curve in drawn}


def test_every_curve_agrees_with_the_advice_at_the_job_s_own_value(shipped):
    _, advice, drawn = shipped
    steps = {name: row.step.total for name, row in advice.rows.items()}
    best = {
        name: min(seconds for row, seconds in steps.items() if row.startswith(name))
        for name in ("top2", "shared_expert", "scmoe_pos2")
    }
    expected = [
        steps["top2"] / best["scmoe_pos2"],
        best["top2"] / best["scmoe_pos2"],
        best["shared_expert"] / best["scmoe_pos2"],
    ]
    assert {*drawn} == {*OWN}
    for name, x in OWN.items():
        (point,) = (each for each in drawn[name].points if each.x == x)
        assert [value for value, _ in point.over.values()] == pytest.approx(expected), name


def test_a_wider_model_has_wider_heads_where_their_width_is_stated(shipped):
    profile, *_ = shipped
    model = config_for(REQUEST, profile).model
    head_dim = f"model.head_dim={model.dim // model.heads}"
    stated = replace(REQUEST, overrides=[*REQUEST.overrides, head_dim])
    by_width, by_heads = (
        [each.memory(1, 1) for each in wider(request, profile, 2.0)]
        for request in (REQUEST, stated)
    )
    assert by_width == by_heads


def test_a_line_is_within_its_band(shipped):
    for curve in shipped[-1].values():
        for point in curve.points:
            assert all(low <= value <= high for value, (low, high) in point.over.values())


def test_a_wider_link_leaves_less_to_gain_once_the_rows_are_hidden(shipped):
    _, advice, drawn = shipped
    step = advice.rows["scmoe_pos2"].step
    assert step.exposed_rows < 0.01 * step.total
    wider = [point for point in drawn["bandwidth"].points if point.x >= OWN["bandwidth"]]
    gains = [point.over["over sequential top2"][0] for point in wider]
    assert len(gains) == 3 and gains == sorted(gains, reverse=True)


def test_a_dot_stands_where_transfers_of_that_size_were_measured(measured):
    """A copy of each token is DIM numbers. The smallest transfer is one copy in eight chunks, the
    largest one two copies in one piece."""
    profile, models, job = measured
    one_copy = TOKENS * DIM * BYTES
    least, most = SMALL * 8 / one_copy, LARGE / (2 * one_copy)
    expected = {0.99 * least: False, 1.01 * least: True, 0.99 * most: True, 1.01 * most: False}
    for rows, is_dot in expected.items():
        scaled = replace(job, sizes=job.sizes._replace(rows=rows))
        assert is_measured(models, profile, scaled) is is_dot, rows
    fewer_ranks = replace(job, sizes=job.sizes._replace(ep_size=4))
    assert not is_measured(models, profile, fewer_ranks)
    uneven = rank_shares(load_of("hot_rank:1.7"), Routed(8, 2, RANKS))
    loaded = [replace(model, loads=uneven) for model in models]
    assert not is_measured(loaded, profile, job)


@pytest.mark.parametrize("word", WORDS)
def test_a_link_that_the_user_sets_is_not_a_measured_one(word, measured):
    profile, models, job = measured
    assert is_measured(models, profile, job)
    changed = overridden(profile, [f"cluster.{word}"])
    assert not is_measured(models, changed, job)


def test_dots_are_drawn_at_the_measured_points_alone(measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(drawing, "heading", lambda figure, words: figures.append((figure, words)))
    paths = [*draw_curves(REQUEST, measured[0], tmp_path)]
    dots = {}
    for path, (figure, words) in zip(paths, figures, strict=True):
        lines = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert len(lines) == 3 and "dots: " in words, "one for each rival"
        dots[path.stem] = [float(x) for x in lines[0].get_xdata()]
    rate = pytest.approx(RATE / 1e9)
    assert dots == {
        "bandwidth": [rate],
        "ep": [RANKS],
        "tokens": [TOKENS, 4 * TOKENS],
        "width": [DIM, 2 * DIM],
        "load": [1.0],
    }


def test_a_profile_that_states_measured_values_is_not_called_unmeasured(shipped):
    """Without the sizes of its exchanges, no dot is drawn."""
    text = (SHIPPED / "cluster/8xH100.yaml").read_text(encoding="utf-8")
    text = text.replace("source: guess", "source: measured")
    stated = parse_profile(text.replace("source: datasheet", "source: measured"), "mine", "mine")
    profile, _, drawn = shipped
    points = drawn["load"].points
    assert "nothing of this cluster is measured" in basis(points, profile)
    _, models, job = request_on(stated)
    assert not is_measured(models, stated, job)
    assert "nothing" not in basis(points, stated) and "extrapolation" in basis(points, stated)
