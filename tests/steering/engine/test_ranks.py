"""Particles spread over processes: two of them make the pictures of one."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler
from torch import distributed as dist
from torch import multiprocessing
from torch.nn.functional import one_hot

from diffplug.plug import plug
from diffplug.seeds import Seeds, generators
from diffplug.steering import SVDD, Churn, FeynmanKac, Network, NoiseSearch, Resampling
from diffplug.steering.engine.ranks import Ranks, SharedRows, SharedSlots, slots_of
from diffplug.steering.engine.slots import Slots
from diffplug.testing import tiny

PROMPTS = ["a red circle", "a blue square"]


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red of pictures [n, 3, h, w] in [0, 1]."""
    return images[:, 0].mean((1, 2))


class FailsIn:
    """A reward that raises at its second scoring in one process."""

    def __init__(self, process: int) -> None:
        self.process, self.scorings = process, 0

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Return the redness."""
        self.scorings += 1
        if self.scorings > 1 and self.process == int(os.environ.get("RANK", "0")):
            raise RuntimeError("out of paint")
        return red(images, prompts)


RUNS: dict[str, Any] = {
    "generators": lambda: FeynmanKac(
        red,
        particles=4,
        strength=3000.0,
        selection=Resampling(ess_threshold=None, islands=1),
        network=Network(ranks=True),
    ),
    "all": lambda: FeynmanKac(
        red,
        particles=4,
        strength=3000.0,
        returns="all",
        selection=Resampling(islands=1),
        network=Network(ranks=True),
    ),
    "churn": lambda: SVDD(
        red,
        particles=4,
        duplicates=4,
        strength=300.0,
        block=2,
        proposal=Churn(1.0),
        network=Network(ranks=True),
    ),
}


def steered(name: str) -> dict[str, Any]:
    """Return pictures, ancestors, rewards and rows of a run; the solver of "churn" has a history."""
    pipe = tiny("sd15")
    solver = UniPCMultistepScheduler if name == "churn" else DDIMScheduler
    pipe.scheduler = solver.from_config(pipe.scheduler.config)
    steerer = RUNS[name]()
    options: dict[str, Any] = {"eta": 1.0} if name != "churn" else {}
    if name == "generators":
        options["generator"] = generators(0, 2)
    if name == "all":
        options["generator"] = torch.Generator().manual_seed(5)
    plugs = [Seeds(7)] if name == "churn" else []
    with plug(pipe, steerer, *plugs) as plugged:
        images = plugged(PROMPTS, num_inference_steps=5, output_type="pt", **options).images
    report = steerer.report
    return {
        "images": torch.as_tensor(images),
        "ancestors": report.ancestors,
        "rewards": report.final_rewards,
        "log_z": report.log_z,
        "rows": report.network_rows,
    }


def process(rank: int, folder: Path) -> None:
    """Run everything in one of two processes and write what came out."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {name: steered(name) for name in RUNS}
    pipe = tiny("sd15")
    wrong = {
        "odd": FeynmanKac(red, particles=5, network=Network(ranks=True)),
        "failing": FeynmanKac(FailsIn(1), particles=4, network=Network(ranks=True)),
        "other seed": FeynmanKac(
            red,
            particles=8,
            strength=3e3,
            seed=rank,
            selection=Resampling(ess_threshold=None),
            network=Network(ranks=True),
        ),
        "other strength": FeynmanKac(red, particles=4, strength=1.0 + rank, network=Network(ranks=True)),
    }
    for name, steerer in wrong.items():
        with pytest.raises(ValueError) as caught, plug(pipe, steerer) as plugged:
            plugged("a red circle", num_inference_steps=4, eta=1.0, generator=generators(0, 1))
        found[name] = str(caught.value)
    found["others' generators"] = ""
    with pytest.raises(ValueError, match="different generators"), plug(pipe, RUNS["all"]()) as plugged:
        plugged("a red circle", num_inference_steps=4, eta=1.0, generator=generators(rank, 1))
    x = torch.arange(4.0) + 10 * rank  # rows 0, 1 of two prompts in process 0, 2 and 3 in the other
    slots = SharedSlots(4, Ranks.of())
    found["taken"] = SharedRows(torch.tensor([3, 0, 2, 1, 4, 5, 4, 7]), slots).take(x)
    found["bytes"] = slots.all(torch.tensor([rank, 5], dtype=torch.bfloat16))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.pipe
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_pictures_of_one(both: list[dict[str, Any]], name: str) -> None:
    alone = steered(name)
    assert bool((alone["ancestors"] // 2 != torch.arange(4) // 2).any()), "no survivor would change process"
    for found in both:
        assert torch.equal(found[name]["ancestors"], alone["ancestors"])
        assert found[name]["rows"] == alone["rows"]
        for key in ("images", "rewards", "log_z"):
            assert torch.allclose(found[name][key], alone[key], atol=1e-5, rtol=1e-4), key
    assert torch.equal(both[0][name]["images"], both[1][name]["images"])


@pytest.mark.pipe
def test_generators_of_pictures_make_the_same_without_ranks(both: list[dict[str, Any]]) -> None:
    pipe = tiny("sd15")
    steerer = FeynmanKac(
        red, particles=4, strength=3000.0, selection=Resampling(ess_threshold=None, islands=1)
    )
    with plug(pipe, steerer) as plugged:
        images = plugged(
            PROMPTS, num_inference_steps=5, output_type="pt", eta=1.0, generator=generators(0, 2)
        )
    assert torch.allclose(torch.as_tensor(images.images), both[0]["generators"]["images"], atol=1e-5)


@pytest.mark.pipe
def test_errors_reach_every_process(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "5 particles cannot be shared by 2 processes: give a multiple of 2" in found["odd"]
        assert "have different calls" in found["other strength"]
        assert "have different ancestors" in found["other seed"]
    assert "process 1 of 2 failed: the reward failed at step 3 of 4: RuntimeError" in both[0]["failing"]
    assert "the reward failed at step 3 of 4: RuntimeError: out" in both[1]["failing"]


def test_rows_come_from_wherever_they_are(both: list[dict[str, Any]]) -> None:
    # slots 0 and 1 of both prompts in process 0, 2 and 3 in process 1
    assert both[0]["taken"].tolist() == [11.0, 0.0, 2.0, 3.0]
    assert both[1]["taken"].tolist() == [10.0, 1.0, 2.0, 13.0]
    assert both[1]["bytes"].tolist() == [0.0, 5.0, 1.0, 5.0]


@pytest.mark.law
def test_a_lone_process_sends_nothing_and_takes_rows() -> None:
    assert Ranks.of() == Ranks() and Slots(4).own == range(4)
    assert slots_of(4, False) == Slots(4) and slots_of(4, True).own == range(4)
    assert SharedSlots(6, Ranks(1, 3)).own == range(2, 4)
    assert SharedSlots(6, Ranks(1, 3)).mine(list(range(12))) == [2, 3, 8, 9]
    ancestors = torch.tensor([[0, 0, 2], [0, 1, 2]])
    rows = Slots(3).moved(ancestors)
    assert rows is not None and rows.source.tolist() == [0, 0, 2, 3, 4, 5] and rows.count == 6
    x = one_hot(torch.arange(6))
    assert torch.equal(rows.take(x), x[rows.source])
    assert Slots(3).moved(torch.arange(3).expand(2, 3)) is None


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="NoiseSearch runs in one process"):
        NoiseSearch(red, network=Network(ranks=True))
