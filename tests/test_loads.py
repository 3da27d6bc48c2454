"""Loads make the imbalance that their formulas say, for distinct experts of a token and equal
chunks of tokens."""

import pytest
import torch

from experiments.bench import emulated
from experiments.bench.rate_search import warn_of_share
from experiments.bench.setting import Setting
from scmoe.command_line import call
from scmoe.config.leaves import ConfigError
from scmoe.loads import (
    BALANCED,
    LOAD_KINDS,
    CurrentLoad,
    Sizes,
    check_load,
    counts_of,
    deal,
    dealt_ids,
    imbalance,
    load_of,
    rank_sequences,
    shares,
)
from scmoe.moe.dispatcher import Traffic
from scmoe.moe.recorded_routing import Recorded, write_routing

TOKENS, SEQUENCES, EXPERTS = 1024, 4, 8
LOADS = (
    *("balanced", "zipf:0.5", "zipf:1.5", "hot_rank:1.3", "hot_rank:2"),
    *("rotating:1.7:2", "ragged:1.25"),
)
SIZES = [Sizes(EXPERTS, top_k, ranks) for top_k in (1, 2) for ranks in (2, 4)]
# load: max over mean of ranks, of experts, with 2 ranks and 8 experts, one choice of a token
FORMULAS = {
    "balanced": (1.0, 1.0),
    "hot_rank:1.7": (1.7, 1.7),
    "rotating:1.7:1": (1.7, 1.7),
    "zipf:1": (1.533, 2.943),
    "ragged:1.5": (1.0, 1.0),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LOADS)
def test_tokens_choose_distinct_experts_and_all_copies_are_dealt(name, sizes):
    for phase in range(load_of(name).phases(sizes.ranks)):
        ids_TK = dealt_ids(load_of(name), sizes, 0, TOKENS, phase)
        assert (
            ids_TK.shape == (TOKENS, sizes.top_k)
            and int(ids_TK.min()) >= 0
            and int(ids_TK.max()) < EXPERTS
        )
        assert all(len({*ids}) == sizes.top_k for ids in ids_TK.tolist())
        wanted = shares(load_of(name), sizes, phase)
        counts = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
        assert sum(wanted) == pytest.approx(1) and max(wanted) <= 1 / sizes.top_k + 1e-9
        assert counts.sum() == TOKENS * sizes.top_k
        assert (counts - torch.tensor(wanted) * TOKENS * sizes.top_k).abs().max() <= 1, (
            "largest remainders"
        )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", LOADS)
def test_chunks_of_tokens_have_equal_loads(name, sizes):
    """The rows of the busiest rank and of the busiest expert differ by 3 % at most between
    chunks."""
    for chunks in (2, 4):
        counts_PE = counts_of(load_of(name), sizes, [TOKENS], 0, chunks)[:, 0].double()
        counts_PR = counts_PE.view(chunks, sizes.ranks, -1).sum(2)
        for counts in (counts_PE, counts_PR):
            busiest = counts[:, counts.sum(0).argmax()]
            assert (busiest / busiest.mean() - 1).abs().max() < 0.03


@pytest.mark.parametrize(("name", "expected"), FORMULAS.items())
def test_the_imbalance_is_that_of_the_formula(name, expected):
    found = imbalance(load_of(name), Sizes(EXPERTS, 1, 2), SEQUENCES, TOKENS // SEQUENCES)
    assert (found["max_over_mean_ranks"], found["max_over_mean_experts"]) == pytest.approx(
        expected, rel=5e-3
    )
    assert found["max_over_mean_tokens"] == (1.5 if name == "ragged:1.5" else 1.0)


def test_heat_above_one_choice_of_every_token_goes_to_the_other_experts():
    """Half of the copies of a top-2 routing at most; zipf:3 has 83 % for expert 0."""
    own = shares(load_of("zipf:3"), Sizes(EXPERTS, 2, 2))
    assert own[0] == 0.5 and sum(own) == pytest.approx(1) and max(own[1:]) <= 0.5


def test_the_hot_rank_moves():
    sizes, x_TD = Sizes(EXPERTS, 1, 2), torch.zeros(TOKENS, 4)

    def of_rank_0(current: CurrentLoad) -> float:
        return float((deal(sizes, 0, current)(x_TD) < EXPERTS // 2).double().mean())

    rotating = [of_rank_0(CurrentLoad(load_of("rotating:1.7:2"), step)) for step in range(6)]
    assert rotating == pytest.approx([0.85, 0.85, 0.15, 0.15, 0.85, 0.85], abs=0.01)


def test_ragged_tokens_have_the_total_of_the_balanced_ones():
    assert rank_sequences(load_of("ragged:1.5"), 4, 2) == [6, 2]
    assert rank_sequences(load_of("ragged:1.25"), 4, 4) == [5, 4, 4, 3]
    assert rank_sequences(load_of(BALANCED), 4, 2) == [4, 4]


def recording(tmp_path, top_k: int, layers: int = 2) -> str:
    """Write two steps of 64 tokens; in step 10, layer 0, three of four tokens go to expert 5."""
    torch.manual_seed(0)
    ids = [torch.rand(2, 64, EXPERTS).argsort(-1)[..., :top_k] for _ in range(layers)]
    others = [[5, e] for e in (0, 1, 2)] + [[3, 5]]
    halves = [torch.randperm(32) + 32 * rank for rank in (0, 1)]
    ids[0][1] = torch.tensor(others * 16)[torch.cat(halves), :top_k]
    write_routing(Recorded([0, 10], ids, EXPERTS, 2), tmp_path / "r.safetensors")
    return f"recorded:{tmp_path / 'r.safetensors'}"


def test_a_recording_is_replayed_with_its_first_choices(tmp_path):
    load, sizes = load_of(recording(tmp_path, 2) + ":10:0"), Sizes(EXPERTS, 1, 2)
    assert load.phases(2) == 1
    for num_tokens in (16, 32, 128):  # fewer than the 32 recorded ones of a rank, as many, more
        counts = torch.bincount(dealt_ids(load, sizes, 1, num_tokens).flatten(), minlength=EXPERTS)
        assert (
            counts[5] == pytest.approx(0.75 * num_tokens, rel=0.3 if num_tokens < 32 else 0)
            and counts[3] > 0
        )
    found = imbalance(load, sizes, 1, 32)
    assert (found["max_over_mean_ranks"], found["max_over_mean_experts"]) == (1.5, 6.0)


def test_a_second_choice_that_is_not_recorded_has_the_distribution_of_the_first(tmp_path):
    load = load_of(recording(tmp_path, 1) + ":10:0")
    ids_TK = dealt_ids(load, Sizes(EXPERTS, 2, 2), 0, 32)
    assert all(first != second for first, second in ids_TK.tolist())
    assert {*ids_TK[ids_TK[:, 0] == 5, 1].tolist()} == {3}, (
        "the only other choice that was recorded"
    )


def test_a_recording_is_spread_over_any_number_of_steps(tmp_path):
    load = load_of(recording(tmp_path, 1))
    assert load.phases(2) == 4 and len({load.phase(step, 2) for step in range(4)}) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hot_rank:5", "load is hot_rank:5, allowed with 2 ranks: 1 to 2"),
        ("hot_rank:nan", "load is hot_rank:nan, allowed with 2 ranks: 1 to 2"),
        ("burst:1.7:1", "load is burst:1.7:1, allowed: balanced | zipf:A"),
        ("zipf:-1", "load is zipf:-1, allowed: 0 to 10"),
        ("zipf:x", "load is zipf:x, allowed: zipf:A"),
        ("rotating:1.7", "load is rotating:1.7, allowed: balanced | zipf:A"),
        ("rotating:1.7:0", "load is rotating:1.7:0, allowed: N of 1 or more"),
        ("ragged:1.3", "allowed with 2 ranks of 4 sequences: multiples of 0.25 from 1 to 1.75"),
        ("even", "load is even, allowed: balanced | zipf:A"),
        (
            "recorded:nowhere.safetensors",
            "load is recorded:nowhere.safetensors: nowhere.safetensors is not a recorded",
        ),
    ],
)
def test_an_impossible_load_is_refused_in_one_sentence(text, says, capsys):
    assert call("bench", "overlap", "--load", text) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_recording_of_other_experts_is_refused(tmp_path):
    load = load_of(recording(tmp_path, 1))
    with pytest.raises(ConfigError, match=f"a recording of {EXPERTS} experts"):
        check_load(load, Sizes(16, 1, 2), 4)
    write_routing(
        Recorded([0], [torch.tensor([[[5], [8], [8]]])], EXPERTS, 1),
        tmp_path / "padding.safetensors",
    )
    padding = load_of(f"recorded:{tmp_path / 'padding.safetensors'}")
    with pytest.raises(ConfigError, match="fewer tokens in a step than the 2 ranks"):
        check_load(padding, Sizes(EXPERTS, 1, 2), 4)
    with pytest.raises(ConfigError, match="allowed as step: 0, 10"):
        load_of(recording(tmp_path, 1) + ":7")


@pytest.mark.parametrize(("sent", "received"), [(3, 5), (5, 3), (4, 4), (4, 0), (0, 4)])
def test_free_transfers_bring_as_many_rows_as_the_peers_send(sent, received):
    rows, traffic = torch.ones(sent, 2), Traffic([sent], [received])
    target, work = emulated.free(rows, traffic)
    work.wait()
    assert target.shape == (received, 2) and target.sum() == 2 * min(sent, received)
    back, _ = emulated.free(target, traffic.back())
    assert back.shape == rows.shape


def test_the_help_names_every_form_of_a_load():
    assert [form for form in LOAD_KINDS.split()[1:] if form not in Setting.__doc__] == []


def test_a_share_that_is_missed_is_said(capsys):
    warn_of_share(0.3, 0.43)
    assert "0.43" in capsys.readouterr().err
    warn_of_share(0.3, 0.32)
    warn_of_share(None, 0.43)
    assert capsys.readouterr().err == ""


def test_choices_are_copied_to_a_device_once():
    """Each copy lets the host wait for a GPU in the middle of a block."""
    x_TD = torch.empty(TOKENS, 4, device="meta")
    dealt = deal(Sizes(EXPERTS, 2, 1), 0, CurrentLoad(load_of(BALANCED)))
    assert dealt(x_TD) is dealt(x_TD)
    assert dealt(x_TD).device.type == "meta"
