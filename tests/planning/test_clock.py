"""The clock runs variants in turn and leaves the rounds to warm up out; the report shows what its
rows have."""

from scmoe.planning.clock import in_turn, median, quartiles, undisturbed


def test_variants_run_in_turn_and_rounds_to_warm_up_are_left_out():
    ran, said = [], []

    def run(name, *numbers):
        ran.append(name)
        return [len(ran) + number for number in numbers]

    runs = {"a": lambda: run("a", 0, 0.5), "b": lambda: run("b", 0)}
    found = in_turn(runs, rounds=2, warm_up=1, say=said.append)
    assert ran == ["a", "b"] * 3
    assert found["a"].tolist() == [[3, 5], [3.5, 5.5]] and found["b"].tolist() == [[4, 6]], (
        "[numbers, rounds]"
    )
    assert said == [f"round {i} of 2, 2 variants" for i in range(3)]
    assert in_turn({"c": lambda: 7}, rounds=3)["c"].tolist() == [7, 7, 7]


def test_a_time_is_undisturbed_if_the_process_had_its_core():
    assert undisturbed(lambda: 7, float("inf"))[1] > 0
    assert undisturbed(lambda: 7, -1) == (7, None)
    assert (median([3, 1, 2]), quartiles([1, 2, 3, 4, 5, 6, 7])) == (2, [2, 6])
    assert quartiles([2, 1]) == [1, 2], "not beyond what was measured"
