from __future__ import annotations

import pytest
from plots.figures import strings

from cifar10_tl.plots import importance_bars, search_history

ACCURACIES = {0: 0.5, 1: 0.4, 3: 0.2, 4: 0.6, 5: 0.55}  # trial 2 failed


def test_history_shows_each_trial_and_the_best_so_far() -> None:
    fig = search_history(ACCURACIES, [3], heading="Search")
    best, finished, pruned, star = fig.axes[1].get_lines()
    assert list(best.get_xdata()) == [0, 1, 4, 5, 5]
    assert list(best.get_ydata()) == [0.5, 0.5, 0.6, 0.6, 0.6]
    assert (list(finished.get_xdata()), list(finished.get_ydata())) == ([0, 1, 4, 5], [0.5, 0.4, 0.6, 0.55])
    assert (list(pruned.get_xdata()), list(pruned.get_ydata())) == ([3], [0.2])
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([4], [0.6])
    assert {"☆ best val accuracy 60.00% in trial 4", "best so far", "finished", "pruned"} <= set(strings(fig))
    assert "pruned" not in strings(search_history({0: 0.5}, [], heading="Search"))


def test_importance_has_a_bar_and_a_number_per_setting() -> None:
    fig = importance_bars({"optimizer.lr": 0.75, "seed": 0.25}, heading="Importance", note="few trials")
    lr, seed = (bar.get_width() for bar in fig.axes[0].patches)
    assert lr == pytest.approx(3 * seed)
    assert {"optimizer.lr", "75.0%", "seed", "25.0%", "few trials"} <= set(strings(fig))
