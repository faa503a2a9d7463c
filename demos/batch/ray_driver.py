"""A Ray cluster as a driver of shards: actors hold the pipeline, our own records say what is done.

Ray's checkpoints are as coarse as one write task and count rows twice where a source cannot be filtered, so
none are used: a cluster that dies is started again like any other process.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

from diffplug.demos.batch.drivers import Stopped, loop
from diffplug.demos.batch.job import Job
from diffplug.demos.batch.plan import Shard
from diffplug.demos.batch.render import Outcome, Tell, Worker
from diffplug.recipe import Recipe

__all__ = ["run"]


class _Actor:
    """Makes the shards of a batch of rows; built once an actor, with the model in it."""

    def __init__(self, job: Job, model: Any, recipes: Sequence[Recipe]) -> None:
        self.worker = Worker(job, model, recipes)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was done for pickled shards, pickled."""
        import numpy as np

        shards = [pickle.loads(data) for data in batch["shard"]]  # noqa: S301  made by `run`, a moment ago
        said: list[Any] = []
        try:
            said += loop(self.worker, shards)
        except Stopped as error:
            said.append(str(error))
        column = np.empty(len(shards), dtype=object)
        column[:] = [pickle.dumps(said), *(pickle.dumps([]) for _ in shards[1:])]
        return {"said": column}


def run(
    job: Job,
    model: Any,
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    *,
    address: str | None = None,
    workers: int = 1,
    tell: Tell = lambda kind, n, of: None,
) -> list[Outcome]:
    """Return what was done for every shard by the actors of a cluster, which share the job's folder.

    address: of a cluster that runs ("auto", "ray://host:10001"); None starts one on this machine. workers:
    actors at most; each takes a GPU where the cluster has some. Ray listens on every interface of the
    machine. Raises ValueError without Ray or where no cluster answers, Stopped as `drivers.run` does.
    """
    if not shards:
        return []
    ray = _started(address, workers)
    gpus = ray.cluster_resources().get("GPU", 0)
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    done: list[Outcome] = []
    try:
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(job, model, list(recipes)),
            batch_size=1,
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(gpus) or workers)),
        )
        for batch in data.iter_batches(batch_size=1):
            for said in pickle.loads(batch["said"][0]):  # noqa: S301  made by our own actors
                if isinstance(said, str):
                    raise Stopped(said)
                done.append(said)
                tell("made", said.made, 0)
                tell("failed", said.failed, 0)
    finally:
        ray.shutdown()
    return done


def _answers(address: str | None) -> None:
    """Raise ValueError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    import socket

    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # none, or a word that Ray looks up, such as "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, "
            "or leave --address out"
        ) from None


def _started(address: str | None, workers: int) -> Any:
    """Return the module ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError('--engine ray needs Ray: pip install "diffplug[ray]"') from None
    import logging

    _answers(address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        options["_node_ip_address"] = "127.0.0.1"
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises its own kinds, and ConnectionError
        raise ValueError(f"no Ray cluster at {address!r}: {str(error).splitlines()[0][:200]}") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    return ray
