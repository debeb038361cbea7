"""Callbacks of a run: figures, metrics, speed, checkpoints and guards."""

from cifar10_tl.callbacks.checkpoint import RunCheckpoint
from cifar10_tl.callbacks.ema import WeightEMA
from cifar10_tl.callbacks.figures import (
    ConfusionMatrix,
    CorrectPredictions,
    Curves,
    IncorrectPredictions,
    SampleInputs,
)
from cifar10_tl.callbacks.graceful_stop import GracefulStop
from cifar10_tl.callbacks.gradient_flow import GradientFlow
from cifar10_tl.callbacks.metrics_logger import MetricsLogger
from cifar10_tl.callbacks.nan_guard import NaNGuard
from cifar10_tl.callbacks.progress_bar import RunProgressBar
from cifar10_tl.callbacks.step_logger import StepLogger
from cifar10_tl.callbacks.throughput import Throughput
from cifar10_tl.callbacks.time_budget import TimeBudget

__all__ = [
    "ConfusionMatrix",
    "CorrectPredictions",
    "Curves",
    "GracefulStop",
    "GradientFlow",
    "IncorrectPredictions",
    "MetricsLogger",
    "NaNGuard",
    "RunCheckpoint",
    "RunProgressBar",
    "SampleInputs",
    "StepLogger",
    "Throughput",
    "TimeBudget",
    "WeightEMA",
]
