"""The two pictures of a finished training, as PNG files: the curves of the epochs, and the confusion matrix."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt
import numpy as np

LEGIBLE_CLASSES = 20


def draw_curves(history: Mapping[str, Sequence[float]], path: Path) -> None:
    """Loss and accuracy of training and validation, epoch by epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        epochs = range(1, len(history[metric]) + 1)
        axis.plot(epochs, history[metric], marker="o", label="training (with dropout)")
        axis.plot(epochs, history[f"val_{metric}"], marker="o", label="validation")
        axis.set(xlabel="epoch", ylabel=metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend()
    figure.savefig(path)
    plt.close(figure)


def draw_confusion(confusion: np.ndarray[Any, Any], classes: Sequence[str], path: Path) -> None:
    """The counts of (true class, predicted class), shape (classes, classes)."""
    size = 3 + min(0.5 * len(classes), 20)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    axis.imshow(confusion, cmap="Blues")
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(range(len(classes)), classes, rotation=90)
    axis.set_yticks(range(len(classes)), classes)
    if len(classes) <= LEGIBLE_CLASSES:
        for (true, predicted), count in np.ndenumerate(confusion):
            colour = "white" if count > confusion.max() / 2 else "black"
            axis.text(predicted, true, str(count), ha="center", va="center", color=colour)
    figure.savefig(path)
    plt.close(figure)
