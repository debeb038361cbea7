from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from plots.figures import history, strings

from cifar10_tl.plots import curves


def lines(fig: Figure, panel: int) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_xdata()) for line in fig.axes[1 + panel].get_lines()}


def test_the_best_epoch_is_marked_in_both_panels() -> None:
    rows = history(5)
    rows[2]["val/acc"] = 0.95
    fig = curves(rows, heading="Run", best=2, monitor="val/loss")
    assert "☆ best val loss 1.0000 at epoch 2" in strings(fig)
    fig = curves(rows, heading="Run", best=2)
    assert "☆ best val accuracy 95.00% at epoch 2" in strings(fig)
    for panel, value in ((1, 0.95), (2, 1.0)):
        (star,) = [line for line in fig.axes[panel].get_lines() if line.get_marker() == "*"]
        assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [value])


def test_epochs_without_a_finite_value_are_left_out() -> None:
    rows = history(6)
    for epoch in (0, 2, 4):
        rows[epoch] |= {"val/acc": None, "val/loss": float("nan")}
    rows[5]["val/loss"] = float("inf")
    fig = curves(rows, heading="h")
    assert lines(fig, 0)["val"] == [1, 3, 5]
    assert lines(fig, 1)["val"] == [1, 3]
    assert lines(fig, 0)["train"] == [0, 1, 2, 3, 4, 5]
    alone = curves([{"epoch": 0, "train/acc": 0.5, "train/loss": float("nan")}], heading="h")
    assert set(lines(alone, 0)) == {"train"}
    assert strings(alone).count("no values") == 1
    assert not any("best" in text for text in strings(alone))


@pytest.mark.parametrize("n", [1, 2, 8, 200])
def test_epoch_ticks_are_integers_from_zero(n: int) -> None:
    fig = curves(history(n), heading="h")
    ticks = [label.get_text() for label in fig.axes[1].get_xticklabels()]
    assert "0" in ticks
    assert all(tick.lstrip("\N{MINUS SIGN}").isdecimal() for tick in ticks)
    assert (fig.axes[1].get_lines()[0].get_marker() == "o") == (n <= 30)
