from __future__ import annotations

import numpy as np
from plots.figures import strings

from cifar10_tl.plots.accuracy_against_time import Point, accuracy_against_time


def test_each_point_has_its_bar_and_its_name() -> None:
    points = [Point("experiment=cpu", 60, 0.9, 0.88, 0.91), Point("$x_1", 10, 0.8, 0.7, 0.9)]
    fig = accuracy_against_time({"photos": points, "drawings": points[:1]})
    _, first, second = fig.axes
    assert [text.get_text() for text in first.texts] == ["1", "2"]
    assert [text.get_text() for text in second.texts] == ["1"]
    assert {"photos", "1 experiment=cpu", "2 $x_1", "drawings"} <= set(strings(fig))
    bars = [container.lines[2][0].get_segments()[0] for container in first.containers]
    assert np.allclose(bars, [[[60, 0.88], [60, 0.91]], [[10, 0.7], [10, 0.9]]])
    assert first.get_xscale() == "log"
