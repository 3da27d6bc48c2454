"""The chart of the experts' load is readable."""

from matplotlib.figure import Figure

from scmoe.training.callbacks.load_chart import draw_load
from tests.support.pictures import assert_readable


def test_the_picture_is_drawn_for_few_and_many_experts_and_is_readable(tmp_path, monkeypatch):
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, metadata: drawn.append(figure))
    over_training = {step: [1.2, 1.5, 3.4, 1.1, 1.9] for step in (9, 19, 29)}
    for num_experts, steps in ((2, {}), (64, over_training), (8, {9: [1.0] * 5, 19: [1.0] * 5})):
        draw_load([list(range(num_experts)), [0] * num_experts], tmp_path / "load.png", steps)
        assert_readable(drawn[-1])
    assert [len(figure.axes) for figure in drawn] == [2, 3, 3], (
        "a heat map, its colours, and the load over training"
    )
    assert [len(figure.axes[1].lines) for figure in drawn[1:]] == [3, 1], "one rank is never uneven"
