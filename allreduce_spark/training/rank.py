"""The life of one rank, from top to bottom: load, join, train, hand over the result."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from allreduce_spark.checkpoint.shares import LOCAL_FOLDER, ShareWriter
from allreduce_spark.communicator.base import Communicator
from allreduce_spark.config import Checkpoint, FitConfig
from allreduce_spark.data.shard import Shard
from allreduce_spark.data.spec import RowSpec
from allreduce_spark.errors import CollectiveError, RendezvousTimeoutError
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.backends import ours
from allreduce_spark.training.batches import data_sets
from allreduce_spark.training.callbacks import First, Last, callbacks_of_rank
from allreduce_spark.training.cores import use_cores
from allreduce_spark.training.function import FunctionJob, run_function
from allreduce_spark.training.job import Job, check_arrival, load_job
from allreduce_spark.training.local_steps import LocalSteps
from allreduce_spark.training.loop import Loop, continue_logs
from allreduce_spark.training.losses import globalize_losses
from allreduce_spark.training.memory import CallbackMemory
from allreduce_spark.training.optimizer import StepRows, distribute_steps
from allreduce_spark.training.result import build_like, write_result
from allreduce_spark.training.resume import Resume, read_saved_state
from allreduce_spark.training.saver import Saver
from allreduce_spark.training.state import Position, RankState, SavedState, build_metrics, make_randomness_differ
from allreduce_spark.training.watched import WatchedCommunicator, limited_by, open_within
from allreduce_spark.world import Membership, World

__all__ = ["Checkpointing", "run_rank", "train"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpointing:
    """Where a rank goes on, and how it keeps its own state.

    Attributes:
        folder: Private to this machine; shares of checkpoints are written to `checkpoints` in it.
        checkpoint: How often; None where nothing is to be saved.
        resume: Where to go on; None to begin at the beginning.
        announce: Called by a thread with "saved" or "save_failed", and what there is to say (see `Saver`).
        timeout_s: How long the training waits for a checkpoint to come to its store.
    """

    folder: Path
    checkpoint: Checkpoint | None
    resume: Resume | None
    announce: Callable[[str, dict[str, Any]], None]
    timeout_s: float


def run_rank(channel: Channel, folder: Path, threads: int) -> None:
    """Be one rank.

    Args:
        channel: To the agent.
        folder: The agent's scratch folder, with the job and the shard; the root leaves its result there.
        threads: This rank's share of the cores.

    Raises:
        Exception: Whatever goes wrong; the caller reports it. The communicator is then not to be used any more.
    """
    function = FunctionJob.read(folder)
    if function is not None:
        run_function(function, channel, folder, threads)
        return
    status = StatusPage(folder / "status")
    job = Job.read(folder)
    use_cores(threads)
    # Loading needs nobody else, so it is done while the shards are still on their way to disk.
    _seed(job.config.seed, int(os.environ["PMI_RANK"]))
    model, callbacks = load_job(job)
    check_arrival(model, job)

    start = channel.receive(job.timeouts.start_s + job.timeouts.spool_s)
    membership = Membership(**{**start.fields["membership"], "world": World(**start.fields["membership"]["world"])})
    status.write(Phase.INIT)
    opened = open_within(job.timeouts, start.fields["approved"]["backend"], membership.world)
    communicator = WatchedCommunicator(opened, status)
    communicator.timeout_s = job.timeouts.collective_s

    status.write(Phase.FIRST_STEP)
    spec, validation_spec = _specs(start.fields["approved"])
    report = (lambda **fields: channel.send("progress", **fields)) if membership.world.is_root else None
    history = train(
        model,
        communicator,
        job.config,
        membership,
        shards={
            number: (
                Shard.open(folder / f"train-{number}.arrow", spec),
                Shard.open(folder / f"validation-{number}.arrow", validation_spec),
            )
            for number in range(communicator.rank, len(membership.rows), communicator.world_size)
        },
        callbacks=callbacks,
        seed_states=job.seed_states,
        status=status,
        report=report,
        checkpointing=Checkpointing(
            folder,
            job.checkpoint,
            Resume.from_json(start.fields["resume"]) if start.fields.get("resume") else None,
            partial(_announce, channel, job),
            job.timeouts.checkpoint_s,
        ),
    )

    status.write(Phase.RESULT)
    if membership.world.is_root and history is not None:
        write_result(model, history, spec, folder / "result")
    with limited_by("result_s"):
        communicator.barrier(timeout_s=job.timeouts.result_s)
    status.write(Phase.TEARDOWN)
    communicator.close()
    channel.send("done", regroups=history is None)


def _announce(channel: Channel, job: Job, kind: str, fields: dict[str, Any]) -> None:
    """Tell the agent of a share; where it is to be brought to a store, wait until it is: no other one is taken meanwhile."""
    channel.send(kind, **fields)
    if kind == "saved" and job.checkpoint is not None and job.checkpoint.path is not None:
        try:
            while channel.receive(job.timeouts.checkpoint_s).fields["id"] != fields["id"]:
                pass  # the answer to one that was given up
        except RendezvousTimeoutError as error:
            log.warning(
                "checkpoint %s is not in its store yet: %s. Setting: Timeouts.checkpoint_s", fields["id"], error
            )


def train(
    model: keras.Model,
    communicator: Communicator,
    config: FitConfig,
    membership: Membership,
    *,
    shards: Mapping[int, tuple[Shard, Shard]],
    callbacks: list[keras.callbacks.Callback],
    seed_states: list[list[int]],
    status: StatusPage,
    report: Callable[..., None] | None,
    checkpointing: Checkpointing | None = None,
) -> keras.callbacks.History | None:
    """Fit `model` on this rank's rows, in step with all other ranks.

    Args:
        model: Compiled; the same on every rank.
        shards: This rank's, by number: the training rows, and the rows of a validation set of its own.
        callbacks: The user's; the same on every rank.
        seed_states: States of the model's random generators to start from. Where they are not as many as the built model
            has (building may make more), each rank starts from its own.
        status: Where this rank says how far it is.
        report: Called with progress now and then, on the root; None elsewhere.
        checkpointing: None where nothing is saved, and the training begins at the beginning.

    Returns:
        The history; None where the training is not over, because there are slots for more ranks to go on with.
    """
    data, validation = data_sets(config, membership, shards)
    _build(model, data.spec, communicator)
    make_randomness_differ(model, seed_states, communicator.rank)
    saved = None
    if checkpointing and checkpointing.resume:
        saved = read_saved_state(checkpointing.resume, communicator, checkpointing.folder)
    begin = saved.position if saved else Position(config.initial_epoch)
    if not ours.COMPILES_CALLS:
        model.jit_compile = False  # compiled code would know no way out to the communicator
    model.steps_per_execution = 1  # the same steps, one at a time: rows are counted between them
    rows, reduce, local = StepRows(), None, None
    if config.sync_every == 1:
        order = ours.ProgramOrder()
        reduce = distribute_steps(model, communicator, rows, order)
        globalize_losses(model, communicator, rows, order)
    elif communicator.world_size > 1:
        local = LocalSteps(model, communicator, data.plan, config.sync_every)
    averaging = local or reduce

    users = callbacks_of_rank(callbacks, membership.world.is_root)
    if saved:
        continue_logs(users.values(), begin.epoch)
    history, saver = keras.callbacks.History(), None
    state = RankState(model, communicator, averaging.agreed if averaging else [], CallbackMemory(users), history)
    if checkpointing and checkpointing.checkpoint:
        resumed = checkpointing.resume.id if checkpointing.resume else None
        saver = Saver(
            checkpointing.checkpoint,
            state,
            ShareWriter(checkpointing.folder / LOCAL_FOLDER, communicator.rank, resumed=resumed),
            communicator,
            local=local,
            begin=begin,
            steps=data.plan.steps,
            epochs=config.epochs,
            announce=checkpointing.announce,
            status=status,
            timeout_s=checkpointing.timeout_s,
        )
    first = First(communicator, rows, local, data, validation, begin, status, report)
    last = Last(communicator, first, callbacks, data.plan, saver, status)
    if saved and begin.step:
        build_metrics(model, data)
    with ours.within_steps():
        model.fit(
            data.dataset(),
            # A fit that had come to its end gets no further epoch, but what Keras and the callbacks do at the end.
            epochs=begin.epoch if saved and saved.has_stopped else max(config.epochs, begin.epoch),
            initial_epoch=begin.epoch,
            validation_data=None if validation is None else validation.dataset(),
            validation_freq=config.validation_freq,
            class_weight=config.class_weight,
            callbacks=Loop(
                [first, *users.values(), history, last],
                data.plan,
                begin,
                partial(_restore, state, saved) if saved else None,
                model=model,
                epochs=config.epochs,
            ),
            shuffle=False,  # ShardBatches does it, in an order that can be repeated
            verbose=0,
        )
    if saver:
        saver.close()
    if last.regroups:
        return None
    check_same_weights(model, communicator)
    return history


def _restore(state: RankState, saved: SavedState, with_metrics: bool) -> None:
    state.restore(saved)
    if with_metrics:
        state.restore_metrics(saved)


def check_same_weights(model: keras.Model, communicator: Communicator) -> None:
    """Make sure that all ranks hold the same bits.

    Raises:
        CollectiveError: They do not; which ranks differ is said.
    """
    digest = hashlib.sha256()
    for variable in (*model.weights, *model.optimizer.variables):
        digest.update(variable.numpy().tobytes())
    digests = [part.tobytes() for part in communicator.allgather(np.frombuffer(digest.digest(), np.uint8))]
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise CollectiveError(
            f"after training, ranks {different} hold other weights than the root. Something in the model or its callbacks "
            "changes variables on each rank by itself: a learning rate or an assign that depends on random numbers or time."
        )


def _seed(seed: int, rank: int) -> None:
    keras.utils.set_random_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))


def _specs(approved: dict[str, str | None]) -> tuple[RowSpec, RowSpec | None]:
    """What the driver found the rows of all ranks to look like: those to train on, and those of a validation set."""
    train, validation = approved["spec"], approved["validation_spec"]
    assert train is not None  # the driver approves no data without rows
    return RowSpec.from_json(train), None if validation is None else RowSpec.from_json(validation)


def _build(model: keras.Model, spec: RowSpec, communicator: Communicator) -> None:
    """Make all variables exist, with the same values on every rank."""
    was_built = model.built
    build_like(model, spec)
    if not was_built:
        for variable in model.weights:  # each rank has drawn its own
            value = np.array(variable.numpy())
            communicator.broadcast(value)
            variable.assign(value)
