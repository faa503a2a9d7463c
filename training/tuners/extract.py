"""A LoRA cut from a student that learnt in all its weights: the closest to each layer's change.

Every linear and convolution layer's change is a matrix; its largest singular values are kept (the
Eckart-Young theorem), the rest is dropped, and so are the changes of biases and norms, which no LoRA holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.training.conditions import one_denoiser
from diffplug.training.tuners.lora import lora_targets, write_lora

__all__ = ["extract_lora", "factors"]


@torch.no_grad()
def extract_lora(
    pipe: Any,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    rank: int,
    folder: Path,
    save_dtype: str = "float16",
) -> dict[str, Any]:
    """Write `adapter.safetensors` of this rank; return what the recipe says of it, and the error left.

    before, after: the denoiser's weights by name.
    """
    weights: dict[str, Tensor] = {}
    lost = kept = 0.0
    for name in lora_targets(one_denoiser(pipe)):
        change = (after[f"{name}.weight"] - before[f"{name}.weight"].to(after[f"{name}.weight"])).float()
        down, up = factors(change, rank)
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = down, up
        rest = change.flatten(1) - up.flatten(1) @ down.flatten(1)
        lost, kept = lost + float(rest.square().sum()), kept + float(change.square().sum())
    ranks = {name: _rank_of(weights[f"{name}.lora_A.weight"]) for name in lora_targets(one_denoiser(pipe))}
    smaller = {name: r for name, r in ranks.items() if r != rank}
    config = {"r": rank, "lora_alpha": rank, "rank_pattern": smaller, "alpha_pattern": smaller}
    saved = write_lora(pipe, weights, config, folder, getattr(torch, save_dtype))
    return {**saved, "lost": (lost / kept) ** 0.5 if kept else 0.0}


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (down, up) whose product is the closest of `rank` to a layer's change, in the layer's shape.

    change: [out, in] of a linear layer or [out, in, h, w] of a convolution. The singular values are shared
    evenly between the two.
    """
    u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    down, up = root[:, None] * v[:r], u[:, :r] * root
    if change.ndim == 4:
        return down.reshape(r, *change.shape[1:]).float(), up[:, :, None, None].float()
    return down.float(), up.float()


def _rank_of(down: Tensor) -> int:
    return len(down)
