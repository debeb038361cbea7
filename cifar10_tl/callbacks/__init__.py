"""What a run shows of itself. Each callback is thin: it collects, a pure function draws, the result is published."""

from cifar10_tl.callbacks.confusion_matrix import ConfusionMatrix
from cifar10_tl.callbacks.correct_predictions import CorrectPredictions
from cifar10_tl.callbacks.curves import Curves
from cifar10_tl.callbacks.evaluation_progress import EvaluationProgress
from cifar10_tl.callbacks.finite_loss import FiniteLoss
from cifar10_tl.callbacks.history import History
from cifar10_tl.callbacks.incorrect_predictions import IncorrectPredictions
from cifar10_tl.callbacks.progress import RunProgress
from cifar10_tl.callbacks.run_checkpoint import RunCheckpoint
from cifar10_tl.callbacks.sample_inputs import SampleInputs
from cifar10_tl.callbacks.stop_on_signal import StopOnSignal
from cifar10_tl.callbacks.throughput import Throughput
from cifar10_tl.callbacks.weight_ema import WeightEMA

__all__ = [
    "ConfusionMatrix",
    "CorrectPredictions",
    "Curves",
    "EvaluationProgress",
    "FiniteLoss",
    "History",
    "IncorrectPredictions",
    "RunCheckpoint",
    "RunProgress",
    "SampleInputs",
    "StopOnSignal",
    "Throughput",
    "WeightEMA",
]
