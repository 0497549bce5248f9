"""What tests of exactness have in common, on whatever backend: rows, ranks that are threads, and what must be equal."""

from __future__ import annotations

import concurrent.futures

import numpy as np

from allreduce_spark.communicator.local import LocalGroup

RELATIVE = 1e-5


def assert_exact(ranks, reference, relative=RELATIVE):
    """All ranks hold the same bits after every epoch, and at the end the weights of one process."""
    assert ranks[0].digests, "no epoch was trained"
    for rank in ranks[1:]:
        assert rank.digests == ranks[0].digests, "the ranks hold different bits"
    for variable, ours, theirs in zip(reference.model.weights, ranks[0].weights, reference.weights, strict=True):
        distance = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-8)
        assert distance < relative, f"{variable.path} is {distance:.2g} away from one process's"


def assert_same_history(ranks, reference, relative=RELATIVE):
    """All ranks have the history of one process."""
    assert all(rank.history == ranks[0].history for rank in ranks)
    assert ranks[0].history.keys() == reference.history.keys()
    for name, values in reference.history.items():
        np.testing.assert_allclose(ranks[0].history[name], values, rtol=relative, atol=1e-7, err_msg=name)


def dense_data(sizes, seed=0, weights=False):
    """Rows for each shard: (x, y), or (x, y, weight)."""
    chance = np.random.default_rng(seed)
    parts = []
    for size in sizes:
        x = chance.normal(size=(size, 8)).astype("float32")
        y = (x[:, 0] + 2 * x[:, 1] > chance.normal(size=size)).astype("int64")
        parts.append((x, y, chance.uniform(0.1, 3, size).astype("float32")) if weights else (x, y))
    return parts


def on_ranks(function, *items):
    """What `function(communicator, item)` returns on each rank, one for each item."""
    communicators = LocalGroup(len(items), timeout_s=60).communicators

    def call(communicator, item):
        try:
            return function(communicator, item)
        except BaseException as error:
            communicator.abort(repr(error))
            raise

    with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
        futures = [pool.submit(call, *pair) for pair in zip(communicators, items, strict=True)]
        return [future.result() for future in futures]
