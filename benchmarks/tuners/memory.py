"""Bytes that a training step takes, counted by the profiler's allocator events: works without a GPU.

Persistent: weights, adapters, vectors, positions and the optimiser's state, after a first step. Peak: these
and the largest sum of what is allocated and freed again within a later step (activations, gradients).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.training import SaRA
from diffplug.training.tuners.lora import LoraTuner

MIB = 2**20

UNET: dict[str, Any] = {
    "block_out_channels": (96, 192, 384, 384),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Stable Diffusion 1.5 at .3 of its width: 81.48 million weights."""

BARS = {"i": 690.0, "ii": 430.0}


@dataclass(frozen=True)
class Cost:
    """MiB that stay, MiB at the peak, CPU seconds of a step (the least of a few), numbers trained."""

    method: str
    trained: int
    persistent: float
    peak: float
    seconds: float


def peak_of(step: Callable[[], None]) -> float:
    """Return the largest running sum of allocator events within a step, in MiB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    total = most = 0
    for _, size in events:
        total += size
        most = max(most, total)
    return most / MIB


def unet(setup: str) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the U-Net and its inputs. "i": batch 2, 32 x 32; "ii": checkpointed, batch 1, 16 x 16."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(**UNET)
    batch, side = (2, 32) if setup == "i" else (1, 16)
    if setup == "ii":
        model.enable_gradient_checkpointing()
        model.train()
    return model, (torch.randn(batch, 4, side, side), torch.full((batch,), 500), torch.randn(batch, 77, 768))


def measured(method: str, setup: str, *, density: float = 0.058, steps: int = 3) -> Cost:
    """Return what training the U-Net by a method costs: "full", "sara", "lora"."""
    model, inputs = unet(setup)
    return cost_of(method, model, lambda: model(*inputs)[0].square().mean(), density=density, steps=steps)


def cost_of(
    method: str, model: Any, loss: Callable[[], Tensor], *, density: float, rank: int = 16, steps: int = 3
) -> Cost:
    """Return what a step of a method costs on any model."""
    kept: list[Tensor] = []
    if method in ("sara", "dense"):
        tuner = SaRA(model, density=density)
        values: list[nn.Parameter] = tuner.parameters()
        kept = [t for entry in tuner.entries for t in (entry.index, entry.before)]
        if method == "dense":
            _dense(tuner)
    elif method == "lora":
        lora = LoraTuner(rank=rank)
        lora.attach(model)
        model.train()
        values = list(lora.parameters.values())  # type: ignore[arg-type]
    else:
        values = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(values, lr=1e-4, weight_decay=0, foreach=False)
    if method == "sara":
        tuner.attach(optimizer)

    def step() -> None:
        loss().backward()
        if method == "dense":
            _gather(tuner)
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    vectors = values if method in ("sara", "dense") else []
    whole = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers(), *vectors, *kept, *state]}
    seconds = min(_timed(step) for _ in range(steps))
    persistent = sum(whole.values()) / MIB
    trained = sum(v.numel() for v in values)
    return Cost(method, trained, persistent, persistent + peak_of(step), seconds)


def _timed(step: Callable[[], None]) -> float:
    began = process_time()
    step()
    return process_time() - began


def _dense(tuner: SaRA) -> None:
    """Let all dense gradients live until the end of the backward pass, as the published code does."""
    for hook in tuner._hooks:
        hook.remove()


def _gather(tuner: SaRA) -> None:
    for entry in tuner.entries:
        entry.gather(entry.weight)
