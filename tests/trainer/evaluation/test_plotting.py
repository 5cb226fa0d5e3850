"""Labels at the ends of lines."""

import pytest

pytest.importorskip("matplotlib", reason='needs the trainer\'s extra: pip install -e ".[train]"')

from udi_trainer.evaluation.plotting import curves, new_figure, separated


@pytest.mark.parametrize(
    "places, wanted",
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.52, 0.54], [0.42, 0.52, 0.62]),
        ([0.98, 0.99], [0.9, 1.0]),  # not above the axes
        ([-0.3, 0.0], [0.0, 0.1]),
        ([0.4, 0.4, 0.5, 0.52], [0.305, 0.405, 0.505, 0.605]),  # separated labels push their neighbours
    ],
)
def test_names_are_spread(places, wanted):
    assert separated(places, 0.1) == pytest.approx(wanted)


def test_equal_lines_are_drawn_once_under_both_names():
    axes = new_figure(4, 3).subplots()
    style = {"color": "blue"}
    lines = [("a", [1, 2], [0.5, 1.0], style), ("b", [1, 2], [0.5, 0.9], style), ("c", [1, 2], [0.5, 1.0], style)]
    curves(axes, [*lines, ("never trained", [], [], style)])
    assert len(axes.lines) == 2
    assert {text.get_text() for text in axes.texts} == {"a = c", "b"}


def test_one_epoch_is_a_dot_and_what_was_not_finite_has_no_name():
    axes = new_figure(4, 3).subplots()
    curves(axes, [("a", [1], [0.5], {"color": "blue"}), ("b", [1, 2], [0.5, float("nan")], {"color": "red"})])
    assert axes.lines[0].get_marker() == "o"
    assert [text.get_text() for text in axes.texts] == ["a"]
