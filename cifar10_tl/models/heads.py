"""Classification heads. To add one, write a module like these and list it in ``HEADS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from cifar10_tl.config.errors import UserError


class LinearHead(nn.Module):
    """Global average pooling and a linear layer."""

    pools = True

    def __init__(self, num_features: int, num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_classes))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map features [N, C, h, w] to logits [N, K]."""
        return self.layers(feature_map.mean((2, 3)))


class DenseHead(nn.Module):
    """Global average pooling and dense ReLU layers with dropout."""

    pools = True

    def __init__(
        self, num_features: int, num_classes: int, hidden: Sequence[int] = (512,), dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(*dense_layers(num_features, hidden, dropout, num_classes))

    def forward(self, feature_map: Tensor) -> Tensor:
        """Map features [N, C, h, w] to logits [N, K]."""
        return self.layers(feature_map.mean((2, 3)))


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
        _, (last_hidden, _) = self.lstm(feature_map.flatten(2).transpose(1, 2))
        return self.layers(last_hidden.transpose(0, 1).flatten(1))


def dense_layers(num_inputs: int, hidden: Sequence[int], dropout: float, num_outputs: int) -> list[nn.Module]:
    """Return a linear layer, ReLU and dropout for each size in ``hidden``, and a final linear layer."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(num_inputs, width), nn.ReLU(inplace=True), nn.Dropout(dropout)]
        num_inputs = width
    return [*layers, nn.Linear(num_inputs, num_outputs)]


HEADS: dict[str, Callable[..., nn.Module]] = {"linear": LinearHead, "dense": DenseHead, "lstm": LSTMHead}


def pools(head: nn.Module) -> bool:
    """Return whether ``head`` starts with global average pooling (``pools = True``)."""
    return bool(getattr(head, "pools", False))


def build_head(settings: Mapping[str, Any], num_features: int, num_classes: int) -> nn.Module:
    """Build the head ``settings["name"]`` with the other settings.

    Raises:
        UserError: The head or one of its settings does not exist.
    """
    options = dict(settings)
    name = options.pop("name", None)
    if name not in HEADS:
        raise UserError(f"model.head.name={name}: there are {', '.join(HEADS)}")
    try:
        return HEADS[name](num_features, num_classes, **options)
    except TypeError as error:
        raise UserError(f"model.head={name}: {error}") from error
