"""The order of collectives within one traced step: TensorFlow would run them in any, and the ranks would miss each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

__all__ = ["ProgramOrder"]


class ProgramOrder:
    """Leaves the graph for numpy code, one call after the other, in the order in which a step's code was traced.

    All that calls collectives in the steps of one model must share one.
    """

    def __init__(self) -> None:
        self._graph: Any = None
        self._last: list[Any] = []

    def call(self, function: Callable[..., Any], inputs: Sequence[Any], types: Sequence[Any]) -> list[Any]:
        """Call `function` with the inputs as numpy arrays when the step runs.

        Returns:
            Its results as tensors of `types`. Their shapes are not known; whoever knows them sets them.
        """
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        known = graph is not None and graph is self._graph
        with tf.control_dependencies(self._last if known else []):
            outputs = list(tf.numpy_function(function, inputs, list(types)))
        self._graph, self._last = graph, outputs[:1]
        return outputs
