"""Ranks, agents and what is between them die at every point of a fit, and it ends with the bits of one that was left alone."""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path

import pytest
from faulty_fits import (
    Fault,
    Outcome,
    compiled,
    exit_quietly,
    fit,
    kill_agent,
    kill_agent_once_saved,
    kill_rank,
    kill_warm_process,
    limit_file_size,
    raise_error,
    replace_by_file,
    stop_rank,
)
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint, Timeouts
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import RankFailedError
from allreduce_spark.spark import ranks

pytestmark = pytest.mark.spark


def test_a_fit_whose_ranks_die_again_and_again_ends_with_the_same_bits(
    undisturbed: Outcome,
    nothing_is_left: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults = (
        Fault("train_begin", 1, kill_rank),
        Fault("train_batch_end", 0, kill_rank, 0, 3),
        Fault("test_batch_end", 1, kill_rank, 0, 0),
        Fault("train_batch_end", 0, kill_rank, 1, 4),  # both at once
        Fault("train_batch_end", 1, kill_rank, 1, 4),
        Fault("train_batch_end", 0, kill_warm_process, 2, 2),
        Fault("epoch_end", 1, exit_quietly, 2),
        Fault("train_batch_end", 1, raise_error, 3, 0),
        Fault("train_end", 0, kill_rank),
    )
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        fit(*faults, folder=tmp_path, verbose=2).check_is(undisturbed)
    epochs = [line.partition("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert epochs == [f"Epoch {number + 1}" for number in range(len(undisturbed.history["loss"]))]
    assert "failed first in phase 'train' at epoch 0, step 3: the rank process was killed by SIGKILL" in caplog.text
    assert "the license server did not answer" in caplog.text


def test_agents_that_die_cost_a_barrier_stage_and_nothing_else(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store")
    faults = (
        Fault("train_batch_end", 1, partial(kill_agent_once_saved, Path(store.path), 1), 1, 2),
        Fault("test_batch_end", 0, kill_agent, 2, 0),
        Fault("train_end", 1, kill_agent),  # while the root brings its result
    )
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        outcome = fit(*faults, folder=tmp_path, checkpoint=Checkpoint(store.path, every_steps=2))
    outcome.check_is(undisturbed)
    assert re.search(r"another barrier stage goes on .*: rank 1 .* failed first .*: the agent is gone", caplog.text)
    assert "from epoch 1, step 2" in caplog.text or "from epoch 1, step 0" in caplog.text
    assert len(store.checkpoints()) == 3
    assert all(not store.verify(each.id) for each in store.checkpoints())


def test_without_a_store_a_lost_agent_means_to_begin_anew_with_the_same_bits(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        fit(Fault("train_batch_end", 0, kill_agent, 1, 2), folder=tmp_path).check_is(undisturbed)
    assert "from the beginning with 2 of 2 ranks" in caplog.text


def test_a_rank_that_hangs_is_replaced_when_its_step_takes_too_long(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        fault = Fault("train_batch_end", 1, stop_rank, 1, 2)
        fit(fault, folder=tmp_path, timeouts=Timeouts(step_s=12.0)).check_is(undisturbed)
    assert "Timeouts.step_s" in caplog.text


def test_an_error_that_comes_again_at_the_same_step_ends_the_fit_and_says_so(
    spark: SparkSession, nothing_is_left: None, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError, match="the same error came at the same step again") as caught:
        fit(Fault("train_batch_end", 1, raise_error, 1, 2, again=True), folder=tmp_path)
    assert (caught.value.rank, caught.value.epoch, caught.value.step) == (1, 1, 2)
    assert caught.value.cause.startswith("ConnectionError: the license server did not answer")


def test_training_goes_on_where_no_checkpoint_can_be_written(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    faults = (
        Fault("train_batch_end", 1, limit_file_size, 1, 2),  # the disk of one executor
        Fault("train_batch_end", 0, kill_rank, 3, 1),  # from the last one that was good
        Fault("train_batch_end", 0, partial(replace_by_file, store), 3, 3),  # the store
    )
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        outcome = fit(*faults, folder=tmp_path, checkpoint=Checkpoint(str(store), every_steps=2))
    outcome.check_is(undisturbed)
    messages = [record.getMessage() for record in caplog.records if "training goes on" in record.getMessage()]
    assert any("File too large" in message for message in messages)
    assert any("Not a directory" in message or "not a directory" in message for message in messages), messages


def test_a_fit_that_begins_with_one_rank_grows_at_the_end_of_an_epoch(
    spark: SparkSession,
    nothing_is_left: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slots that come back, as far as one machine can have it: the first answer is that there is one."""
    answers = iter([1])
    wait_for_slots = ranks.wait_for_slots
    monkeypatch.setattr(ranks, "wait_for_slots", lambda *them: next(answers, None) or wait_for_slots(*them))
    whole = fit(model=compiled(dropout=0), max_restarts=0)
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        grown = fit(
            folder=tmp_path, model=compiled(dropout=0), checkpoint=Checkpoint(str(tmp_path / "store")), min_ranks=1
        )
    grown.check_is_close_to(whole)
    assert (
        "another barrier stage goes on from epoch 1, step 0 with 2 of 2 ranks: there are slots for more ranks"
        in caplog.text
    )
