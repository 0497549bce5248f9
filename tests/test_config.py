"""The settings survive their way to the ranks, whatever kind of number they were given as; and deadlines are written down."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.rendezvous.protocol import Phase

ARCHITECTURE = Path(__file__).parents[1] / "ARCHITECTURE.md"

CONFIGS = {
    "defaults": FitConfig(),
    "Python's numbers": FitConfig(epochs=3, validation_split=0.25, class_weight={1: 2, 0: 0.5}, shuffle=False),
    "numpy's numbers": FitConfig(
        epochs=np.int64(3),
        batch_size=np.int32(8),
        validation_split=np.float32(0.25),
        class_weight=dict(zip(np.unique([1, 0]), np.array([0.5, 2.0], np.float32), strict=True)),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_settings_come_back_from_json_as_they_were(config):
    assert FitConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_every_deadline_and_every_phase_is_in_the_table_of_architecture():
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| (\d+) s \|", ARCHITECTURE.read_text(), re.MULTILINE)
    assert {setting: float(default) for _, setting, default in rows} == dataclasses.asdict(Timeouts())
    assert {phase.value for phase in Phase} <= {phase for phases, _, _ in rows for phase in phases.split(", ")}
