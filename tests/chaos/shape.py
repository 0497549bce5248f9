"""The size of the fits that are disturbed; apart from the script, so that whoever asks for it need not import TensorFlow."""

from __future__ import annotations

__all__ = ["BATCH", "EPOCHS", "EVERY_STEPS", "KEEP", "RANKS", "ROWS", "STEPS"]

ROWS, BATCH, EPOCHS, RANKS = 640, 16, 4, 2
STEPS = ROWS // (BATCH * RANKS)  # of an epoch
EVERY_STEPS = 5  # from one checkpoint to the next
KEEP = 5  # checkpoints
