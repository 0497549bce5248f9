"""The life of one rank, from top to bottom: load, join, train, hand over the result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.config import FitConfig
from allreduce_spark.data.shard import Shard
from allreduce_spark.data.spec import RowSpec
from allreduce_spark.errors import CollectiveError
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.batches import data_sets
from allreduce_spark.training.callbacks import First, Last, callbacks_of_rank
from allreduce_spark.training.cores import use_cores
from allreduce_spark.training.job import Job, check_arrival, seed_variables
from allreduce_spark.training.local_steps import LocalSteps
from allreduce_spark.training.losses import globalize_losses
from allreduce_spark.training.models.model_bytes import load_model
from allreduce_spark.training.optimizer import StepRows, distribute, moving_variables
from allreduce_spark.training.order import ProgramOrder
from allreduce_spark.training.result import build_like, write_result
from allreduce_spark.world import Membership, World

__all__ = ["run_rank", "train"]


def run_rank(channel: Channel, folder: Path, threads: int) -> None:
    """Be one rank.

    Args:
        channel: To the agent.
        folder: The agent's scratch folder, with the job and the shard; the root leaves its result there.
        threads: This rank's share of the cores.

    Raises:
        Exception: Whatever goes wrong; the caller reports it. The communicator is then not to be used any more.
    """
    # Not above: MPI must not be loaded before a rank has been forked.
    from allreduce_spark.communicator.mpi import open_mpi

    status = StatusPage(folder / "status")
    job = Job.read(folder)
    use_cores(threads)
    custom_objects, callbacks = cloudpickle.loads(job.objects)
    # Loading needs nobody else, so it is done while the shards are still on their way to disk.
    _seed(job.config.seed, int(os.environ["PMI_RANK"]))
    model = load_model(job.model_path, custom_objects)
    check_arrival(model, job)

    start = channel.receive(job.timeouts.start_s + job.timeouts.spool_s)
    membership = Membership(**{**start.fields["membership"], "world": World(**start.fields["membership"]["world"])})
    status.write(Phase.INIT)
    # Another rank may still be importing when this one comes.
    communicator = open_mpi(membership.world, timeout_s=job.timeouts.import_s + job.timeouts.init_s)
    communicator.timeout_s = job.timeouts.collective_s

    status.write(Phase.FIRST_STEP)
    spec, validation_spec = _specs(start.fields["approved"])
    report = (lambda **fields: channel.send("progress", **fields)) if membership.world.is_root else None
    history = train(
        model,
        communicator,
        job.config,
        membership,
        shards=(Shard.open(folder / "train.arrow", spec), Shard.open(folder / "validation.arrow", validation_spec)),
        callbacks=callbacks,
        seed_states=job.seed_states,
        status=status,
        report=report,
    )

    status.write(Phase.RESULT)
    if membership.world.is_root:
        write_result(model, history, spec, folder / "result")
    communicator.barrier(timeout_s=job.timeouts.result_s)
    status.write(Phase.TEARDOWN)
    communicator.close()
    channel.send("done")


def train(
    model: keras.Model,
    communicator: Communicator,
    config: FitConfig,
    membership: Membership,
    *,
    shards: tuple[Shard, Shard],
    callbacks: list[keras.callbacks.Callback],
    seed_states: list[list[int]],
    status: StatusPage,
    report: Callable[..., None] | None,
) -> keras.callbacks.History:
    """Fit `model` on this rank's rows, in step with all other ranks.

    Args:
        model: Compiled; the same on every rank.
        shards: The training rows of this rank, and its rows of a validation set of its own.
        callbacks: The user's; the same on every rank.
        seed_states: States of the model's random generators to start from. Where they are not as many as the built model
            has (building may make more), each rank starts from its own.
        status: Where this rank says how far it is.
        report: Called with progress now and then, on the root; None elsewhere.
    """
    rank = communicator.rank
    data, validation = data_sets(config, membership, shards)
    _build(model, data.spec, communicator)
    _make_randomness_differ(model, seed_states, rank)
    model.jit_compile = False  # XLA knows no way out of the graph to the communicator
    model.steps_per_execution = 1  # the same steps, one at a time: rows are counted between them
    rows, local = StepRows(), None
    if config.sync_every == 1:
        order = ProgramOrder()
        distribute(model.optimizer, communicator, rows, moving_variables(model), order)
        globalize_losses(model, communicator, rows, order)
    elif communicator.world_size > 1:
        local = LocalSteps(model, communicator, data.plan, config.sync_every)
    first = First(communicator, rows, local, data, validation, status, report)
    history = model.fit(
        data.dataset(),
        epochs=config.epochs,
        initial_epoch=config.initial_epoch,
        validation_data=None if validation is None else validation.dataset(),
        validation_freq=config.validation_freq,
        class_weight=config.class_weight,
        callbacks=[
            first,
            *callbacks_of_rank(callbacks, membership.world.is_root),
            Last(communicator, first, callbacks),
        ],
        shuffle=False,  # ShardBatches does it, in an order that can be repeated
        verbose=0,
    )
    check_same_weights(model, communicator)
    return history


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


def _make_randomness_differ(model: keras.Model, seed_states: list[list[int]], rank: int) -> None:
    """Equal dropout masks on all ranks would drop the same units for every row of the global batch.

    The root draws what a single process would draw; the other ranks something else.
    """
    variables = seed_variables(model)
    states = seed_states if len(seed_states) == len(variables) else [variable.numpy() for variable in variables]
    for variable, state in zip(variables, states, strict=True):
        value = np.array(state, dtype=variable.dtype)
        if rank:
            value[0] = np.random.SeedSequence([int(value[0]), rank]).generate_state(1)[0]
        variable.assign(value)
