"""Classification heads. To add one, write a module like these and add it to ``HEADS`` (CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import MLP

from cifar10_tl.config.errors import UserError, known_arguments


class PoolingHead(nn.Module):
    """Global average pooling, followed by ``layers``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map features [N, C, h, w] to logits [N, K]."""
        return self.layers(feature_map.mean((2, 3)))


class LinearHead(PoolingHead):
    """Global average pooling and a linear layer."""

    def __init__(self, num_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Dropout(dropout), nn.Linear(num_features, num_classes))


class DenseHead(PoolingHead):
    """Global average pooling and dense ReLU layers with dropout."""

    def __init__(
        self, num_features: int, num_classes: int, hidden: Sequence[int] = (512,), dropout: float = 0.0
    ) -> None:
        super().__init__(*dense_layers(num_features, hidden, dropout, num_classes))


class LSTMHead(nn.Module):
    """An LSTM over the h * w cells of the feature map, row by row, and dense layers on its last hidden states."""

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        lstm_size: int = 256,
        bidirectional: bool = True,
        hidden: Sequence[int] = (256,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(num_features, lstm_size, batch_first=True, bidirectional=bidirectional)
        self.layers = nn.Sequential(*dense_layers(lstm_size * (1 + bidirectional), hidden, dropout, num_classes))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map features [N, C, h, w] to logits [N, K]."""
        _, (last, _) = self.lstm(feature_map.flatten(2).transpose(1, 2))  # [1 or 2 directions, N, lstm_size]
        return self.layers(last.transpose(0, 1).flatten(1))


def dense_layers(num_inputs: int, hidden: Sequence[int], dropout: float, num_outputs: int) -> list[nn.Module]:
    """Return a linear layer, ReLU and dropout for each size in ``hidden``, and a final linear layer."""
    return list(MLP(num_inputs, [*hidden, num_outputs], dropout=dropout))[:-1]  # the last is dropout of the logits


HEADS: dict[str, Callable[..., nn.Module]] = {"linear": LinearHead, "dense": DenseHead, "lstm": LSTMHead}


def build_head(settings: Mapping[str, Any], num_features: int, num_classes: int) -> nn.Module:
    """Build the head ``settings["name"]`` with the other settings."""
    options = dict(settings)
    name = options.pop("name", None)
    if name not in HEADS:
        raise UserError(
            f"model.head.name={name}: choose from {', '.join(HEADS)}, or first import the module that adds it to HEADS "
            "(on the command line: imports=MODULE)"
        )
    known_arguments(HEADS[name], options, "model.head", taken=("num_features", "num_classes"))
    return HEADS[name](num_features, num_classes, **options)
