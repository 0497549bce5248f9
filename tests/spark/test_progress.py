"""What a user sees while a fit runs."""

from __future__ import annotations

from typing import Any

import pytest

from allreduce_spark.spark.progress import Display


def show(verbose: int) -> None:
    display = Display(verbose, epochs=2, num_ranks=3)
    display.show_phase("start")
    for phase in ("spool", "import", "first step"):
        display.report({"phase": phase})
        display.draw()
    for epoch in (0, 1):
        for steps_done in (1, 2, 4):
            display.report(note(epoch, steps_done))
        display.report({"phase": "train"})
        display.draw()
    display.close()


def note(epoch: int, steps_done: int) -> dict[str, Any]:
    logs = {"loss": 0.5 / (epoch + 1), "accuracy": 0.75}
    return {
        "epoch": epoch,
        "steps_done": steps_done,
        "steps": 4,
        "rows": 8 * steps_done,
        "logs": logs,
        "epoch_done": steps_done == 4,
    }


def test_verbose_0_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show(0)
    assert capsys.readouterr() == ("", "")


def test_verbose_1_shows_what_is_waited_for_and_then_a_bar_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    show(1)
    shown = capsys.readouterr().err
    phases = [
        "3 ranks: waiting for Spark to start their tasks (start)",
        "3 ranks: writing the rows to local disks (spool)",
        "3 ranks: importing Keras, loading the model (import)",
        "3 ranks: compiling the first step (first step)",
        "Epoch 1/2: 100%",
        "Epoch 2/2: 100%",
    ]
    places = [shown.index(phase) for phase in phases]
    assert places == sorted(places)
    assert "4/4" in shown
    assert "loss: 0.25 - accuracy: 0.75" in shown
    assert "rows/s" in shown


def test_verbose_2_shows_a_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    show(2)
    out, err = capsys.readouterr()
    assert err == ""
    first, second = out.splitlines()
    assert first.startswith("Epoch 1/2 - 4 steps - ")
    assert first.endswith("s - loss: 0.5 - accuracy: 0.75")
    assert second.endswith("s - loss: 0.25 - accuracy: 0.75")


def test_a_bar_says_that_the_ranks_begin_again_until_there_is_news(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(1, epochs=2, num_ranks=3)
    for fields in (note(0, 4), note(1, 2), {"phase": "restart"}, {"phase": "import"}):
        display.report(fields)
        display.draw()
    before = capsys.readouterr().err
    display.report(note(1, 1))
    display.report(note(1, 4))
    display.close()
    after = capsys.readouterr().err
    assert before.index("Epoch 2/2") < before.index("ranks are started again")
    assert "importing" not in before
    assert "ranks are started again" not in after.rpartition("\r")[2]
    assert "Epoch 2/2: 100%" in after
