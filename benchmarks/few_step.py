"""Time of a step of the schedulers for few-step models, against the Diffusers scheduler that does the same.

    python -m benchmarks.few_step --repeats 300

Each pair runs the same 8 steps on the same tensors, one after the other in each repeat; a figure is the
smallest time of a step over the repeats. For the eta between its limits there is no counterpart: LCM draws as
much noise."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from benchmarks.command import command
from diffplug.samplers.few_step import FlowMatchTCDScheduler, ListedDDIMScheduler

STEPS = 8
SHAPES = {"small": (1, 4, 64, 64), "large": (8, 16, 128, 128)}
SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


def pairs() -> dict[str, tuple[Any, Any]]:
    """Ours and the Diffusers scheduler that costs the same, by name."""
    return {
        "DDIM on a list": (ListedDDIMScheduler(**SD), DDIMScheduler(**SD)),
        "flow TCD, eta 0 / flow Euler": (FlowMatchTCDScheduler(eta=0.0), FlowMatchEulerDiscreteScheduler()),
        "flow TCD, eta 0.5 / flow LCM": (FlowMatchTCDScheduler(eta=0.5), FlowMatchLCMScheduler()),
        "flow TCD, eta 1 / flow LCM": (FlowMatchTCDScheduler(eta=1.0), FlowMatchLCMScheduler()),
    }


def microseconds(scheduler: Any, x: torch.Tensor, output: torch.Tensor) -> float:
    """Time of one step in a whole run, without setting it up."""
    scheduler.set_timesteps(STEPS)
    start = perf_counter()
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return 1e6 * (perf_counter() - start) / STEPS


def measure(pair: tuple[Any, Any], shape: tuple[int, ...], repeats: int) -> tuple[float, float]:
    """The smallest microseconds of a step of both."""
    x, output = torch.randn(shape), torch.randn(shape)
    taken = [[microseconds(each, x, output) for each in pair] for _ in range(repeats)]
    ours, theirs = (min(times) for times in zip(*taken, strict=True))
    return ours, theirs


def main() -> None:
    """Print the table."""
    parser = command(__name__)
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    print("| scheduler | latents | ours, µs | Diffusers, µs | ratio |\n|---|---|---|---|---|")
    for name, pair in pairs().items():
        for shape in SHAPES.values():
            ours, theirs = measure(pair, shape, repeats)
            print(
                f"| {name} | {'x'.join(map(str, shape))} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |"
            )


if __name__ == "__main__":
    main()
