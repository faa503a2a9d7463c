"""Runs that are killed at random moments, inside saves too, and runs of two processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffplug.training import checkpoint
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.trainer import Trainer
from tests.training.test_trainer import Halving

UPDATES = 240  # more than twenty runs reach before they are killed, on a fast machine too
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.training.test_trainer_kills", "accelerate"])


def work(folder: str, die_in: str | None = None, die_at: int = 0, **run: Any) -> None:
    """Train in this process; kill it half way through the file `die_in` of the save after update `die_at`."""
    torch.set_num_threads(1)
    if die_in is not None:
        _kill_inside(die_in, die_at)
    settings = RunSettings(**{"updates": UPDATES, "batch": 8, "save_every": 1, "keep": 2, **run})
    trainer = Trainer(
        Halving(), settings, OptimizerSettings(lr=0.05, warmup=3), folder=Path(folder), cpu=True, resume=None
    )
    trainer.run()
    if trainer.accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


def _kill_inside(name: str, update: int) -> None:
    write, finish, replace = checkpoint._write_tensors, checkpoint.write_json, os.replace

    def tensors(path: Path, values: Any) -> None:
        write(path, values)
        if path.name == name and f"{update:08d}" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def as_json(path: Path, value: Any) -> None:
        if path.name == name and f"{update:08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(path, value)

    def rename(a: Any, b: Any) -> None:
        if name == "rename" and f"{update:08d}" in str(b):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)

    checkpoint._write_tensors, checkpoint.write_json = tensors, as_json
    checkpoint.os.replace = rename  # type: ignore[attr-defined]


def started(folder: Path, **options: Any) -> Any:
    process = PROCESSES.Process(target=work, args=(str(folder),), kwargs=options)
    process.start()
    return process


def final(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("update-*"))[-1]
    assert newest.name.endswith(f"{UPDATES:08d}")
    return {
        f"{name}/{key}": value
        for name in ("weights", "average", "optimizer", "objective-00000")
        for key, value in load_file(newest / f"{name}.safetensors").items()
    }


def newest(folder: Path) -> str:
    """The name of the newest checkpoint, empty where there is none."""
    return max((path.name for path in (folder / "checkpoints").glob("update-*")), default="")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "update" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = started(folder)
    process.join(120)
    assert process.exitcode == 0
    return folder


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_twenty_random_moments_a_run_ends_with_the_same_weights(
    tmp_path: Path, whole: Path
) -> None:
    rng = random.Random(0)
    for _ in range(20):
        before = newest(tmp_path)
        process = started(tmp_path)
        while process.is_alive() and newest(tmp_path) == before:
            time.sleep(0.001)
        process.join(rng.uniform(0.0, 0.02))
        assert process.is_alive(), "the run is too short to be killed so often"
        process.kill()
        process.join(120)
    process = started(tmp_path)
    process.join(120)
    assert process.exitcode == 0
    wanted, found = final(whole), final(tmp_path)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_inside_a_save_a_run_ends_with_the_same_weights(tmp_path: Path, whole: Path) -> None:
    files = [
        "weights.safetensors",
        "average.safetensors",
        "optimizer.safetensors",
        "objective-00000.safetensors",
    ]
    for i, name in enumerate([*files, "state.json", "manifest.json", "rename"]):
        process = started(tmp_path, die_in=name, die_at=4 + 4 * i)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, name
        saved = checkpoint.Checkpoints(tmp_path / "checkpoints").newest()
        assert saved is not None and saved.update == 3 + 4 * i
    process = started(tmp_path)
    process.join(120)
    assert process.exitcode == 0
    wanted, found = final(whole), final(tmp_path)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not list((tmp_path / "checkpoints").glob(".new*"))


def ranked(rank: int, port: int, folder: str, die: int | None, errors: Any, **run: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    if die is not None and rank == 1:
        before = Halving.before
        Halving.before = lambda self, update: os._exit(9) if update == die else before(self, update)  # type: ignore[method-assign]
    try:
        work(folder, **run)
    except ValueError as error:
        errors.put(str(error))
        os._exit(2)


def two(folder: Path, die: int | None = None, **run: Any) -> tuple[list[Any], Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    errors = PROCESSES.SimpleQueue()
    processes = [
        PROCESSES.Process(target=ranked, args=(rank, port, str(folder), die, errors), kwargs=run)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes], errors


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_same_batch(tmp_path: Path, whole: Path) -> None:
    codes, _ = two(tmp_path, save_every=20)
    assert codes == [0, 0]
    wanted, found = final(whole), final(tmp_path)
    for name in wanted:
        assert torch.allclose(wanted[name], found[name], atol=1e-6), name
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_dies_is_told_of_and_the_run_goes_on_from_its_checkpoint(
    tmp_path: Path, whole: Path
) -> None:
    codes, errors = two(tmp_path, die=37, save_every=10)
    assert codes == [2, 9]
    assert "another process of this run has died" in errors.get()
    codes, _ = two(tmp_path, save_every=10)
    assert codes == [0, 0]
    wanted, found = final(whole), final(tmp_path)
    assert all(torch.allclose(wanted[name], found[name], atol=1e-6) for name in wanted)
