"""Brings the shares that a rank writes from its agent's disk to the store, in a thread beside the relay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allreduce_spark.checkpoint.manifest import share_name
from allreduce_spark.checkpoint.shares import held
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import CheckpointError

__all__ = ["upload_share"]


def upload_share(
    store: Store, rank: int, launch: int, fields: dict[str, Any], done: Callable[[dict[str, Any]], None]
) -> None:
    """Upload one share and return at once.

    Args:
        store: Where to.
        rank, launch: Whose share it is; see `share_name`.
        fields: What the rank has said of it: its id and its `file` on this disk, and more.
        done: Called in the thread with the fields, the `name` in the store among them, or with `cause` where it failed.
    """

    def upload() -> None:
        try:
            with held(Path(fields["file"])) as share:
                store.put_share(share, fields["id"], rank, launch)
        except CheckpointError as error:
            done({"id": fields["id"], "cause": str(error)})
        except Exception as error:  # noqa: BLE001  whatever it is: the rank waits for an answer
            done({"id": fields["id"], "cause": f"{type(error).__name__}: {error}"})
        else:
            done({**fields, "name": share_name(rank, launch)})

    threading.Thread(target=upload, name="allreduce-spark-upload", daemon=True).start()
