"""Time of a scheduler's step without the network: our table against Diffusers' UniPC and DPM-Solver++.

    python -m benchmarks.step_overhead --repeats 30

Every scheduler runs the same steps on the same tensors, one after the other in each repeat, so that a busy
machine slows all of them; the figure is the median over repeats of the time of a step. "first" is the set-up
(set_timesteps). On CUDA, runs of ours are also checked for synchronisation with torch's debug mode.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from diffplug.files import output_folder, write_json
from diffplug.samplers import DCSolverScheduler, SolverScheduler

RESULTS = Path(__file__).parent / "results"
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPES = {"small": (1, 4, 64, 64), "large": (8, 16, 128, 128)}
BARS = {"small": 0.33, "large": 0.7}
RATIOS = [1.0, 1.0, 0.93, 0.81, 1.22, 1.07, 0.95, 1.02, 1.1, 1.05]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is timed: runs of `steps` steps, `repeats` times, after one that does not count."""

    steps: int = 10
    repeats: int = 30
    device: str = "cpu"
    dtype: str = "float32"


def schedulers(steps: int) -> dict[str, tuple[Any, Any]]:
    """Ours and the Diffusers scheduler that computes the same, by name."""
    unipc = {**SD, "final_sigmas_type": "sigma_min"}
    third = {**unipc, "solver_order": 3}
    ratios = RATIOS[:steps] + [1.0] * (steps - len(RATIOS))
    stock = UniPCMultistepScheduler(**unipc)
    plus = DPMSolverMultistepScheduler(**SD)
    plus3 = DPMSolverMultistepScheduler(**SD, solver_order=3)
    third_plus = SolverScheduler(**SD, solver="dpm++", solver_options={"order": 3})
    return {
        "UniPC-2": (SolverScheduler(**unipc), stock),
        "UniPC-3": (SolverScheduler(**third), UniPCMultistepScheduler(**third)),
        "DPM-Solver++(2M)": (SolverScheduler(**SD, solver="dpm++"), plus),
        "DPM-Solver++(3M)": (third_plus, plus3),
        "DC-Solver against UniPC-2": (DCSolverScheduler(**SD, dc_ratios=ratios), stock),
    }


def run(scheduler: Any, x: torch.Tensor, output: torch.Tensor) -> float:
    """Seconds of all steps of one run; `output` stands for what a network would say."""
    scheduler.set_begin_index(0)
    times = scheduler.timesteps
    _wait(x)
    start = perf_counter()
    for t in times:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    _wait(x)
    return perf_counter() - start


def measure(pair: tuple[Any, Any], shape: tuple[int, ...], setting: Setting) -> dict[str, float]:
    """Median microseconds of a step of both, and their ratio."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    x, output = (torch.randn(shape, generator=generator).to(setting.device, dtype) for _ in range(2))
    seconds: list[list[float]] = [[], []]
    for _ in range(setting.repeats + 1):
        for scheduler, taken in zip(pair, seconds, strict=True):
            scheduler.set_timesteps(setting.steps, device=setting.device)
            taken.append(run(scheduler, x, output) / setting.steps)
    ours, theirs = (1e6 * median(taken[1:]) for taken in seconds)
    return {"ours_us": ours, "diffusers_us": theirs, "ratio": ours / theirs}


def synchronisations(make: Callable[[], Any], setting: Setting) -> int:
    """How often a run of ours waits for the device, counted by torch; -1 where there is none to wait for."""
    if not setting.device.startswith("cuda"):
        return -1
    scheduler = make()
    x = torch.randn(SHAPES["small"], device=setting.device)
    scheduler.set_timesteps(setting.steps, device=setting.device)
    scheduler.set_begin_index(0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in scheduler.timesteps:
                x = scheduler.step(x, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as a markdown table."""
    lines = ["| solver | latents | ours, µs | Diffusers, µs | ratio |", "|---|---|---|---|---|"]
    for name, sizes in results.items():
        for size, figures in sizes.items():
            cells = [
                name,
                "x".join(map(str, SHAPES[size])),
                *(f"{figures[k]:.0f}" for k in list(figures)[:2]),
            ]
            lines.append(f"| {' | '.join(cells)} | {figures['ratio']:.2f} |")
    return "\n".join(lines)


def document(setting: Setting) -> dict[str, Any]:
    """All pairs on all shapes: what is written and printed."""
    pairs = schedulers(setting.steps)
    results = {
        name: {size: measure(pair, shape, setting) for size, shape in SHAPES.items()}
        for name, pair in pairs.items()
    }
    waits = {name: synchronisations(lambda pair=pair: pair[0], setting) for name, pair in pairs.items()}
    return {"setting": vars(setting), "bars": BARS, "results": results, "synchronisations": waits}


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, runs, prints the table and writes the JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description="Time per step.")
    for name, default in vars(Setting()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--json", type=Path, default=RESULTS / "step_overhead.json", help="where to write")
    given = vars(parser.parse_args(arguments))
    path = given.pop("json")
    output_folder(path.parent)
    found = document(Setting(**given))
    write_json(path, found)
    print(table(found["results"]))
    print(path)


if __name__ == "__main__":
    main()
