"""Ranks as threads of the test process, and the single process that they must equal."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import os
import shutil
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.config import FitConfig
from allreduce_spark.data import Shard, ShardWriter, arrays_to_blocks, decode_block
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.batches import BatchPlan, ShardBatches, validation_rows_of
from allreduce_spark.training.models.model_bytes import load_model, model_and_code
from allreduce_spark.training.rank import Checkpointing, train
from allreduce_spark.world import Membership, worlds_of

sys.path.insert(0, str(Path(__file__).parent))  # for `exactness`

if keras.backend.backend() == "jax":
    import jax

    os.environ["NPROC"] = "12"  # ranks are threads, and each blocks one of JAX's own while it waits for the others
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as in `use_cores`


@dataclass
class Fitted:
    """What one rank, or the reference, ended with.

    Attributes:
        digests: Of weights and optimizer state after every epoch.
        epochs: Their numbers.
        saved: What the rank has announced of its checkpoints; "kept" is a copy of the share.
    """

    model: keras.Model
    history: dict[str, list[float]]
    digests: list[str]
    epochs: list[int] = field(default_factory=list)
    saved: list[dict[str, Any]] = field(default_factory=list)

    @property
    def final(self) -> str:
        """A hash of what there is at the end, when Keras and the callbacks have done their last."""
        return digest_of(self.model)

    @property
    def weights(self) -> list[np.ndarray]:
        return [w.numpy() for w in self.model.weights]


def digest_of(model: keras.Model) -> str:
    digest = hashlib.sha256()
    for variable in (*model.weights, *model.optimizer.variables):
        digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


class Digests(keras.callbacks.Callback):
    """A hash of all weights and of the optimizer state after every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.digests: list[str] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.digests.append(digest_of(self.model))


def write_shard(path: Path, part: tuple[Any, ...] | None, spec: Any = None) -> Shard:
    """A shard of the rows of `part`, (x, y[, sample_weight]); empty where they have no rows."""
    with ShardWriter(path) as writer:
        if part is not None and len(keras.tree.flatten(part)[0]):
            for _, block in arrays_to_blocks(*part, role="train", num_shards=1):
                writer.write(decode_block(block))
    return Shard.open(path, spec)


@pytest.fixture(name="write_shard")
def write_numbered_shard(tmp_path):
    """Returns write(part, spec=None): `write_shard` to a new file."""
    numbers = itertools.count()
    return lambda part, spec=None: write_shard(tmp_path / f"shard{next(numbers)}", part, spec)


class ThreadsInGraph:
    """The graph's collectives of a rank that is a thread: on a group of its own, because nothing orders them among others."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator

    def allreduce_sum(self, tensors: list[Any]) -> list[Any]:
        def reduce(array: np.ndarray) -> np.ndarray:
            buffer = array.copy()
            self._communicator.allreduce(buffer)
            return buffer

        import tensorflow as tf

        reduced = [tf.numpy_function(reduce, [tensor], tensor.dtype) for tensor in tensors]
        for tensor, local in zip(reduced, tensors, strict=True):
            tensor.set_shape(local.shape)
        return reduced


@pytest.fixture
def fit_ranks(tmp_path):
    """Returns fit(model, parts, config, ...): train copies of `model`; parts are (x, y[, weight]), one for each shard.

    There are as many ranks as parts, or `num_ranks`. With `in_graph`, their communicator has collectives for the graph.
    """
    folders = (tmp_path / f"fit{number}" for number in itertools.count())

    def fit(
        model,
        parts,
        config,
        callbacks=list,
        validation=None,
        *,
        num_ranks=None,
        checkpoint=None,
        resume=None,
        in_graph=False,
    ) -> list[Fitted]:
        folder = next(folders)
        folder.mkdir()
        archive = folder / "model.keras"
        content, objects = model_and_code(model)
        archive.write_bytes(content)
        spec = next(s.spec for i, part in enumerate(parts) if len(s := write_shard(folder / f"probe{i}", part)))
        shards = [write_shard(folder / f"train{number}", part, spec) for number, part in enumerate(parts)]
        empty = tuple(keras.tree.map_structure(lambda a: None if a is None else a[:0], part) for part in parts[0])
        tests = [write_shard(folder / f"test{n}", p, spec) for n, p in enumerate(validation or [empty] * len(parts))]
        rows, validation_rows = tuple(map(len, shards)), tuple(map(len, tests))
        world_size = num_ranks or len(parts)
        group, graphs = LocalGroup(world_size, timeout_s=120), LocalGroup(world_size, timeout_s=120)
        if in_graph:
            for communicator, of_graph in zip(group.communicators, graphs.communicators, strict=True):
                communicator.graph = ThreadsInGraph(of_graph)

        copies = [
            load_model(archive, objects) for _ in range(world_size)
        ]  # Keras does not load in several threads at once

        def rank_body(rank: int) -> Fitted:
            communicator, copy = group.communicators[rank], copies[rank]
            membership = Membership(worlds_of(["here"] * world_size)[rank], 0, "threads", rows, validation_rows)
            digests, saved = Digests(), []

            def announce(kind: str, fields: dict[str, Any]) -> None:
                kept = folder / f"{kind}-{len(saved)}-of-{rank}"
                if kind == "saved":
                    shutil.copyfile(fields["file"], kept)  # the rank keeps two
                saved.append({**fields, "kind": kind, "kept": str(kept)})

            try:
                history = train(
                    copy,
                    communicator,
                    config,
                    membership,
                    shards={number: (shards[number], tests[number]) for number in range(rank, len(parts), world_size)},
                    callbacks=[*callbacks(), digests],
                    seed_states=[],
                    status=StatusPage(folder / f"status{rank}"),
                    report=None,
                    checkpointing=Checkpointing(folder / f"scratch{rank}", checkpoint, resume, announce, 60.0),
                )
            except BaseException as error:
                traceback.print_exc()
                communicator.abort(repr(error))
                graphs.communicators[rank].abort(repr(error))
                raise
            return Fitted(copy, history.history, digests.digests, history.epoch, saved)

        with concurrent.futures.ThreadPoolExecutor(world_size) as pool:
            futures = [pool.submit(rank_body, rank) for rank in range(world_size)]
            return [future.result(timeout=200) for future in futures]

    return fit


class GlobalBatches(keras.utils.PyDataset):
    """The batches of all ranks, put together: what one process would train on."""

    def __init__(self, ranks: list[ShardBatches], plan: BatchPlan) -> None:
        super().__init__()
        self._ranks, self._plan = ranks, plan

    def __len__(self) -> int:
        return self._plan.steps

    def __getitem__(self, step: int) -> Any:
        present = [r for r in range(len(self._ranks)) if self._plan.rows_of(r, step)]
        return keras.tree.map_structure(
            lambda *arrays: np.concatenate(arrays), *(self._ranks[r][step] for r in present)
        )


class NextEpoch(keras.callbacks.Callback):
    def __init__(self, ranks: list[ShardBatches]) -> None:
        super().__init__()
        self._ranks = ranks

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for batches in self._ranks:
            batches.epoch = epoch


@pytest.fixture
def fit_reference(tmp_path):
    """Returns fit(model, parts, config, ...): train a copy of `model` with plain Keras on the union of the ranks' batches."""

    def fit(model, parts, config: FitConfig, callbacks=list, validation=None) -> Fitted:
        archive = tmp_path / "model.keras"
        content, objects = model_and_code(model)
        archive.write_bytes(content)
        copy = load_model(archive, objects)
        copy.jit_compile = keras.backend.backend() == "jax"
        spec = next(s.spec for i, part in enumerate(parts) if len(s := write_shard(tmp_path / f"probe{i}", part)))
        shards = [write_shard(tmp_path / f"reference{rank}", part, spec) for rank, part in enumerate(parts)]
        rows = tuple(map(len, shards))
        held_out = validation_rows_of(rows, config.validation_split)
        kept = tuple(n - v for n, v in zip(rows, held_out, strict=True))
        plan = BatchPlan(kept, config.batch_size, len(parts))
        seed = config.seed if config.shuffle else None
        ranks = [ShardBatches({rank: shard}, plan, seed=seed) for rank, shard in enumerate(shards)]
        test_rows = tuple(len(p[1]) for p in validation) if validation else held_out
        test_plan = BatchPlan(test_rows, config.batch_size, len(parts))
        if validation:
            shards = [write_shard(tmp_path / f"kept{rank}", part, spec) for rank, part in enumerate(validation)]
            tests = [ShardBatches({rank: shard}, test_plan) for rank, shard in enumerate(shards)]
        else:
            tests = [ShardBatches({rank: shard}, test_plan, first_rows=kept) for rank, shard in enumerate(shards)]
        digests = Digests()
        history = copy.fit(
            GlobalBatches(ranks, plan),
            validation_data=GlobalBatches(tests, test_plan) if any(test_plan.rows) else None,
            epochs=config.epochs,
            class_weight=config.class_weight,
            callbacks=[NextEpoch(ranks), *callbacks(), digests],
            shuffle=False,
            verbose=0,
        )
        return Fitted(copy, history.history, digests.digests)

    return fit
