"""Batches of thousands: a manifest in, a folder of pictures out; killed and started again, it goes on.

`manifest.py` reads rows, `plan.py` gives every picture an id and cuts shards, `render.py` makes one shard,
`shard.py` and `store.py` put it on the disk whole or not at all, `drivers.py` runs one process, several, or
a cluster, `report.py` tells what came of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.demos.batch.drivers import run as run
    from diffplug.demos.batch.job import Job as Job
    from diffplug.demos.batch.manifest import ManifestError as ManifestError
    from diffplug.demos.batch.manifest import read_manifest as read_manifest
    from diffplug.demos.batch.plan import Plan as Plan
    from diffplug.demos.batch.plan import plan as plan

_HOMES = {
    "Job": "diffplug.demos.batch.job",
    "ManifestError": "diffplug.demos.batch.manifest",
    "Plan": "diffplug.demos.batch.plan",
    "plan": "diffplug.demos.batch.plan",
    "read_manifest": "diffplug.demos.batch.manifest",
    "run": "diffplug.demos.batch.drivers",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
