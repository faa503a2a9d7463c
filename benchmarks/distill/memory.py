"""What a run on SDXL would take of a GPU's memory, counted on tensors without data (device "meta").

    python -m benchmarks.distill.memory --rank 64 --batch 1

Weights, adapter, gradients, AdamW's moments and averages are counted by element. Activations are those that
the backward pass keeps: with gradient checkpointing the inputs of every block, and all of one block while
it is computed again. What PyTorch and CUDA need for themselves is not in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from diffplug.cli.console import print_table
from diffplug.training.tuners.lora import LoraTuner

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
GIB = 2**30
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def unet(rank: int, targets: Sequence[str]) -> tuple[Any, int]:
    """Return SDXL's U-Net with an adapter, without data, and the adapter's number of weights."""
    with torch.device("meta"):
        model = UNet2DConditionModel(in_channels=4, out_channels=4, **SDXL).to(torch.bfloat16)
        tuner = LoraTuner(rank=rank, targets=targets)
        tuner.attach(model)
    return model, sum(value.numel() for value in tuner.parameters.values())


def activations(model: Any, batch: int, side: int) -> tuple[int, int]:
    """Return bytes that stay between the passes with checkpointing, and of the largest block."""
    inside: dict[int, dict[int, int]] = {}
    inputs, stack, largest = 0, [], 0

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal inputs
        stack.append(id(module))
        inside[id(module)] = {}
        inputs += sum(_size(v) for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor))

    def leave(module: nn.Module, *_: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(inside[stack.pop()].values()))

    def keep(x: torch.Tensor) -> torch.Tensor:
        if stack and not isinstance(x, nn.Parameter):
            inside[stack[-1]][id(x)] = _size(x)
        return x

    hooks = []
    for module in model.modules():
        if type(module).__name__ in BLOCKS:
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        x = torch.zeros(batch, 4, side, side, dtype=torch.bfloat16)
        told = {
            "text_embeds": torch.zeros(batch, 1280, dtype=torch.bfloat16),
            "time_ids": torch.zeros(batch, 6),
        }
        states = torch.zeros(batch, 77, 2048, dtype=torch.bfloat16)
        model(x, torch.zeros(batch), states, added_cond_kwargs=told)
    for hook in hooks:
        hook.remove()
    return inputs, largest


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def counted(rank: int, batch: int, side: int, targets: Sequence[str]) -> list[tuple[str, float]]:
    """Return what takes memory, in GiB."""
    model, adapter = unet(rank, targets)
    base = sum(value.numel() for value in model.parameters()) - adapter
    between, block = activations(model, batch, side)
    rows = [
        (f"U-Net, {base / 1e9:.3f} G weights, bfloat16", 2 * base / GIB),
        (f"adapter of rank {rank}, {adapter / 1e6:.0f} M weights, float32", 4 * adapter / GIB),
        ("its gradients", 4 * adapter / GIB),
        ("AdamW's two moments", 8 * adapter / GIB),
        ("its average", 4 * adapter / GIB),
        (f"inputs of the blocks, {batch} latents of {side}x{side}", between / GIB),
        ("one block while it is computed again", block / GIB),
    ]
    return [*rows, ("together", sum(value for _, value in rows))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill.memory")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--side", type=int, default=128, help="of the latents; 128 for 1024 pixels")
    parser.add_argument("--attention", action="store_true", help="adapters on the attention's layers only")
    told = parser.parse_args(arguments)
    rows = counted(told.rank, told.batch, told.side, ATTENTION if told.attention else ())
    print_table(["what", "GiB"], [[name, f"{value:.2f}"] for name, value in rows], right=["GiB"])


if __name__ == "__main__":
    main()
