"""Two processes: copies whose gradients are averaged, and shards of fully_shard, equal one process."""

from __future__ import annotations

import multiprocessing as mp
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.law, pytest.mark.slow]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 31), nn.SiLU(), nn.Linear(31, 7)).double()


def _inputs() -> torch.Tensor:
    return torch.randn(8, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _trained(net: nn.Module, x: torch.Tensor, parts: int, **options: Any) -> Any:
    from diffplug.training import SaRAAdamW

    optimizer = SaRAAdamW(net, lr=1e-2, density=0.2, **options)
    for _ in range(4):
        for part in x.chunk(parts):
            ((net(part) - 1).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.tuner


def _work(rank: int, port: int, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mine, found = _inputs().chunk(2)[rank], {}
    for name, net in (
        ("copies", _net()),
        ("shards", fully_shard(_net(), mesh=init_device_mesh("cpu", (2,)))),
    ):
        delta = _trained(net, mine, 1).delta()
        found[name] = {n: (d.index, d.values) for _, n, d in delta.entries()}
    if rank == 0:
        torch.save(found, Path(out))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    out = str(tmp_path / "delta.pt")
    workers = [context.Process(target=_work, args=(rank, port, out)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0, 0]
    alone = {e.name: (e.index, e.delta) for e in _trained(_net(), _inputs(), 2).entries}
    for found in torch.load(out, weights_only=True).values():
        assert found.keys() == alone.keys()
        for name, (index, delta) in found.items():
            assert torch.equal(index, alone[name][0])
            assert float((delta - alone[name][1]).abs().max()) <= 1e-6
