from __future__ import annotations

from plots.figures import gradients

from cifar10_tl.plots import gradient_flow


def test_each_stage_has_a_line_over_the_epochs() -> None:
    fig = gradient_flow(gradients(3), heading="h")
    (panel,) = fig.axes[1:]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
    assert list(lines) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert lines["layer3"] == ([0, 1, 2], [1.0, 1 / 2, 1 / 3])
    assert panel.get_yscale() == "log"


def test_time_steps_are_drawn_for_the_first_and_the_last_epoch() -> None:
    panel = gradient_flow(gradients(3, time_steps=2), heading="h").axes[2]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()}
    assert lines == {"epoch 0": ([1, 2], [0.1, 1.0]), "epoch 2": ([1, 2], [0.1 / 3, 1 / 3])}
    (only,) = gradient_flow(gradients(1, time_steps=2), heading="h").axes[2].get_lines()
    assert only.get_label() == "epoch 0"
