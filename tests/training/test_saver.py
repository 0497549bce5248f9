"""Checkpoints are taken when they are due, on all ranks at once, and never at the training's cost."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from allreduce_spark.checkpoint.shares import ShareWriter
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.config import Checkpoint, FitConfig
from allreduce_spark.errors import CheckpointError
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training import saver
from allreduce_spark.training.saver import Saver, Schedule
from allreduce_spark.training.state import Position


def play(schedule, step_s, steps, cost_s=0.0, busy=(), begin=0):
    """Take steps, and ask when the schedule wants to be asked: the steps of the questions, and those of the checkpoints."""
    asked, saved, countdown = [], [], 1
    for step in range(begin + 1, begin + steps + 1):
        countdown -= 1
        if countdown <= 0:
            asked.append(step)
            now = step * step_s
            if schedule.is_due(now, step, cost_s if saved else 0.0) and step not in busy:
                schedule.saved(now, step)
                saved.append(step)
            countdown = schedule.steps_to_wait()
    return asked, saved


def test_every_so_many_steps_means_the_multiples_wherever_the_fit_began():
    _, saved = play(Schedule(Checkpoint(every_steps=5), 0.0, 0), step_s=1.0, steps=21)
    assert saved == [5, 10, 15, 20]
    _, saved = play(Schedule(Checkpoint(every_steps=5), 0.0, 7), step_s=1.0, steps=14, begin=7)
    assert saved == [10, 15, 20]


def test_one_that_cannot_be_taken_is_taken_as_soon_as_it_can():
    _, saved = play(Schedule(Checkpoint(every_steps=5), 0.0, 0), step_s=1.0, steps=21, busy=(10, 11, 12))
    assert saved == [5, 13, 15, 20]


def test_every_so_many_seconds_is_kept_to_a_step_with_few_questions():
    asked, saved = play(Schedule(Checkpoint(every_s=60.0), 0.0, 0), step_s=0.01, steps=20_000)
    assert [round(step * 0.01) for step in saved] == [60, 120, 180]
    assert len(asked) < 60


def test_steps_that_become_slower_do_not_put_off_a_checkpoint_for_long():
    schedule = Schedule(Checkpoint(every_s=60.0), 0.0, 0)
    assert not schedule.is_due(0.1, 10, 0.0)
    waited = schedule.steps_to_wait()
    assert waited * 0.1 < 360  # ten times as slow: at half of what it would take at the old pace


def test_automatic_checkpoints_cost_less_than_two_percent_of_the_time():
    cost_s, step_s, steps = 3.0, 0.1, 20_000
    asked, saved = play(Schedule(Checkpoint(), 0.0, 0), step_s, steps, cost_s)
    assert len(saved) > 5
    # The cost of the first is not known before it is taken.
    assert (len(saved) - 1) * cost_s <= 0.02 * steps * step_s
    assert len(asked) < 200
    _, cheap = play(Schedule(Checkpoint(), 0.0, 0), step_s, 1000, cost_s=0.001)
    assert [step * step_s for step in cheap] == pytest.approx([saver.AUTOMATIC_S * n for n in range(1, 11)])


class Numbers:
    """A state that is an array."""

    def collect(self, position):
        return {"x": np.full(4, position.step, "float32")}, {"step": position.step}


@pytest.fixture
def save_alone(tmp_path):
    """Returns (saver, announced, folder) for one rank, which saves at every step."""
    announced = []
    (alone,) = LocalGroup(1, timeout_s=10).communicators

    def make(config=Checkpoint(every_steps=1), writer=None, epochs=2, timeout_s=30.0, announce=None):  # noqa: B008
        writer = writer or ShareWriter(tmp_path, 0)
        rank_saver = Saver(
            config,
            Numbers(),
            writer,
            alone,
            local=None,
            begin=Position(),
            steps=10,
            epochs=epochs,
            announce=announce or (lambda kind, fields: announced.append((kind, fields))),
            status=StatusPage(tmp_path / "status"),
            timeout_s=timeout_s,
        )
        return rank_saver, announced, tmp_path

    return make


def test_what_is_announced_is_on_disk_and_the_newest_two_stay(save_alone):
    rank_saver, announced, folder = save_alone()
    for step in range(1, 5):
        rank_saver.after_step(Position(0, step))
        rank_saver._await_writing()
    rank_saver.close()
    assert [(kind, fields["id"], fields["step"]) for kind, fields in announced] == [
        ("saved", f"000000-0000000{step}", step) for step in range(1, 5)
    ]
    left = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("spare"))
    assert [name.split(".")[0] for name in left] == ["000000-00000003", "000000-00000004"]
    assert announced[-1][1]["file"] == str(folder / left[-1])
    assert announced[-1][1]["bytes"] == (folder / left[-1]).stat().st_size


class Slow(ShareWriter):
    """Writes nothing before it may."""

    def __init__(self, folder):
        super().__init__(folder, 0)
        self.may_write = threading.Event()

    def finish(self):
        assert self.may_write.wait(30)
        return super().finish()


def test_a_step_never_waits_for_the_disk_and_none_is_begun_before_the_last_is_written(save_alone, tmp_path):
    writer = Slow(tmp_path)
    rank_saver, announced, _ = save_alone(writer=writer)
    for step in range(1, 5):
        rank_saver.after_step(Position(0, step))
    assert announced == []
    writer.may_write.set()
    rank_saver._await_writing()
    rank_saver.after_step(Position(0, 5))
    rank_saver.close()
    assert [fields["step"] for _, fields in announced] == [1, 5]


class Full(ShareWriter):
    """The disk is full for the second share."""

    failures = 0

    def finish(self):
        saved = super().finish()
        if saved.path.name.startswith("000000-00000002"):
            raise CheckpointError("no space left on device")
        return saved


def test_a_full_disk_is_a_warning_and_the_training_goes_on(save_alone, tmp_path, caplog):
    rank_saver, announced, _ = save_alone(writer=Full(tmp_path, 0))
    for step in range(1, 4):
        rank_saver.after_step(Position(0, step))
        rank_saver._await_writing()
    rank_saver.close()
    assert [kind for kind, _ in announced] == ["saved", "save_failed", "saved"]
    assert announced[1][1] == {"id": "000000-00000002", "cause": "no space left on device"}
    assert "000000-00000002 could not be saved; training goes on" in caplog.text


def test_a_store_that_hangs_costs_its_time_and_a_warning_and_the_training_goes_on(save_alone, caplog):
    answers, waits = threading.Event(), []

    def announce(kind, fields):
        waits.append(fields["epoch"])
        assert answers.wait(30)

    rank_saver, _, folder = save_alone(Checkpoint(every_s=1000.0, keep_best="loss"), timeout_s=2.0, announce=announce)
    status = StatusPage(folder / "status")
    status.write(Phase.TRAIN, 0, 9)
    rank_saver.after_epoch(Position(1), {"loss": 0.5}, has_stopped=False)
    closing = threading.Thread(target=rank_saver.close)
    closing.start()
    while status.read() != (Phase.CHECKPOINT, 0, 9):
        assert closing.is_alive(), "the driver does not learn what is waited for"
    closing.join(30)
    assert "waited 2 s for the last checkpoint" in caplog.text
    assert "Timeouts.checkpoint_s" in caplog.text
    assert status.read() == (Phase.TRAIN, 0, 9)
    answers.set()
    assert waits == [1]


def test_a_failure_to_tell_the_agent_is_not_swallowed(save_alone):
    rank_saver, _, _ = save_alone()

    def gone(kind, fields):
        raise OSError("the agent is gone")

    rank_saver._announce = gone
    rank_saver.after_step(Position(0, 1))
    with pytest.raises(OSError, match="the agent is gone"):
        rank_saver.close()


@pytest.mark.parametrize(
    ("config", "epochs_saved"),
    [
        (Checkpoint(every_s=1000.0), []),
        (Checkpoint(every_s=1000.0, path="store"), [3]),
        (Checkpoint(every_s=1000.0, keep_best="loss"), [1, 2, 3]),
        (Checkpoint(every_steps=20), [2]),
    ],
)
def test_the_end_of_an_epoch_is_saved_where_it_is_due_or_may_be_the_best_or_is_the_last(
    save_alone, config, epochs_saved
):
    rank_saver, announced, _ = save_alone(config, epochs=3)
    for epoch in range(3):
        rank_saver.after_epoch(Position(epoch + 1), {"loss": 0.5, "each": np.ones(2)}, has_stopped=False)
    rank_saver.close()
    assert [fields["epoch"] for _, fields in announced] == epochs_saved
    assert all(fields["logs"] == {"loss": 0.5} and fields["step"] == 0 for _, fields in announced)


def test_all_ranks_save_the_same_and_each_a_part_of_what_they_share(fit_ranks):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    chance = np.random.default_rng(3)
    parts = [(x, x[:, :1]) for x in (chance.normal(size=(n, 6)).astype("float32") for n in (16, 9, 12))]
    ranks = fit_ranks(
        model, parts, FitConfig(epochs=2, batch_size=4), checkpoint=Checkpoint(every_s=1e-9, path="store")
    )
    # Which ones the disk allows is up to it, but all ranks took the same, and the end of the training is among them.
    ids = [[message["id"] for message in rank.saved] for rank in ranks]
    assert ids[0] == ids[1] == ids[2]
    assert ids[0][-1] == "000002-00000000"
    shared = [{n for n in load_file(rank.saved[-1]["kept"]) if n.startswith("shared/")} for rank in ranks]
    assert sum(map(len, shared)) == len(set().union(*shared)), "two ranks saved the same"
    assert len(set().union(*shared)) == len(model.weights) + len(ranks[0].model.optimizer.variables)
