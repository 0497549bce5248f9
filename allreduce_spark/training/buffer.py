"""Many arrays as one: a single large all-reduce costs less than many small ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["FlatBuffer"]

ALIGNMENT_BYTES = 64  # TensorFlow takes over a numpy array without a copy if it is aligned so (EIGEN_MAX_ALIGN_BYTES)


class FlatBuffer:
    """One array with room for all of `arrays`, and views of it in their shapes.

    float32, or float64 where any of them is: half precision is summed in float32.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        dtype = np.dtype(np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32)
        step = ALIGNMENT_BYTES // dtype.itemsize
        starts = np.cumsum([0, *(-(-a.size // step) * step for a in arrays)])  # each view starts aligned
        memory = np.zeros(int(starts[-1]) * dtype.itemsize + ALIGNMENT_BYTES, np.uint8)
        skip = -memory.ctypes.data % ALIGNMENT_BYTES
        self.flat = memory[skip : skip + int(starts[-1]) * dtype.itemsize].view(dtype)
        self.views = [
            self.flat[start : start + a.size].reshape(a.shape)
            for start, a in zip(starts.tolist(), arrays, strict=False)
        ]

    def fill(self, arrays: Sequence[np.ndarray], share: float) -> None:
        """Write `share * array` for each array."""
        if share == 0:
            self.flat.fill(0)  # Multiplying would not do: a batch that does not count may give nan, and 0 * nan is nan.
            return
        for view, array in zip(self.views, arrays, strict=True):
            np.multiply(array, view.dtype.type(share), out=view)
