from __future__ import annotations

import pytest
import torch
from torch import nn

from cifar10_tl.config.errors import UserError
from cifar10_tl.models.heads import DenseHead, LSTMHead, build_head


@pytest.mark.parametrize("name", ["linear", "dense", "lstm"])
def test_heads_give_a_logit_per_class_for_any_grid(name: str) -> None:
    for grid in (2, 7):
        assert build_head({"name": name}, 512, 10)(torch.randn(3, 512, grid, grid)).shape == (3, 10)


def test_the_dense_head_is_pooling_relu_layers_and_a_final_layer() -> None:
    head = DenseHead(512, 10, hidden=[64, 32], dropout=0.5)
    assert [type(m).__name__ for m in head.layers] == [*["Linear", "ReLU", "Dropout"] * 2, "Linear"]
    assert [m.out_features for m in head.layers if isinstance(m, nn.Linear)] == [64, 32, 10]
    features = torch.randn(2, 512, 3, 3)
    assert torch.allclose(head.eval()(features), head.layers(features.mean((2, 3))))


def test_the_lstm_reads_the_cells_in_order() -> None:
    head = LSTMHead(16, 10, lstm_size=8, bidirectional=True, hidden=[4]).eval()
    features = torch.randn(2, 16, 2, 3)
    sequence = torch.stack([features[:, :, y, x] for y in range(2) for x in range(3)], 1)
    outputs, _ = head.lstm(sequence)
    last = torch.cat([outputs[:, -1, :8], outputs[:, 0, 8:]], 1)  # where each direction ends
    assert torch.allclose(head(features), head.layers(last), atol=1e-6)
    assert not torch.allclose(head(features), head(features.flip(3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "conv"}, "model.head.name=conv: choose from linear, dense, lstm"),
        ({"name": "dense", "depth": 3}, "model.head.depth: no such setting; choose from hidden, dropout"),
    ],
)
def test_an_invalid_head_is_explained(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_head(settings, 512, 10)


def test_the_lstm_head_compiles() -> None:
    """The compiler breaks the graph at an LSTM; values computed before it must not be needed after it."""
    head, feature_map = LSTMHead(16, 3, lstm_size=8, hidden=(8,)), torch.randn(2, 16, 2, 2)
    compiled = torch.compile(head, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(feature_map), head(feature_map))
