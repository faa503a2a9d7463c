"""PSO on two processes, and taken up after a kill: the same weights as in one go."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.trainer import Trainer
from tests.training.preference.test_pso import SINGLE, made

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.training.preference.test_processes", "accelerate"])


def work(folder: str, rank: int | None = None, port: int = 0, die: int | None = None) -> None:
    """Train PSO; pairs survive in some shares of the batch and not in others."""
    torch.set_num_threads(1)
    if rank is not None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
    objective = made(picky, dtype=SINGLE, anchor=5.0)
    if die is not None:
        objective.before = lambda update: os._exit(9) if update == die else None  # type: ignore[method-assign]
    settings = RunSettings(updates=8, batch=4, save_every=2)
    trainer = Trainer(
        objective, settings, OptimizerSettings(lr=1e-3, warmup=0), folder=Path(folder), cpu=True, resume=None
    )
    trainer.run()
    if trainer.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def picky(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Half of the prompts tie always."""
    told = torch.tensor([int(prompt.split()[1]) % 2 for prompt in prompts])
    return latents[:, 0].double().cpu() * told


def final(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "checkpoints").glob("update-*"))[-1]
    assert newest.name.endswith("8")
    return dict(load_file(newest / "weights.safetensors"))


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_and_a_killed_one_end_with_the_weights_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = [
        ("whole", {}),
        ("killed", {"die": 5}),
        ("two", {"rank": 0, "port": port}),
        ("two", {"rank": 1, "port": port}),
    ]
    processes = [PROCESSES.Process(target=work, args=(str(tmp_path / n),), kwargs=k) for n, k in names]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 9, 0, 0]
    again = PROCESSES.Process(target=work, args=(str(tmp_path / "killed"),))
    again.start()
    again.join(100)
    whole, killed, two = (final(tmp_path / name) for name in ("whole", "killed", "two"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in whole.items())
