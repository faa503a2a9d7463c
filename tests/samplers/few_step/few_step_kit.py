"""Synthetic checkpoints of the right structure, a watch over the network, and equality to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffplug.network.denoiser import denoisers
from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.families import family_of

RANK = 2

# how a family's pipeline writes a timestep t of 1000 when it calls the network
TOLD = {
    **dict.fromkeys(
        (
            *("flux-dev", "flux-schnell", "flux2-dev", "flux2-klein", "chroma", "krea2", "longcat-edit"),
            *("qwen-image", "qwen-edit", "qwen21"),
        ),
        lambda t: t * 1000,
    ),
    "z-image": lambda t: 1000 - t * 1000,
    "ace-step": lambda t: t * 1000,
}


def factors(module: nn.Module, seed: int = 0, only: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random factors (down, up) of rank 2 for every Linear and Conv2d of a network, by name."""
    noise = torch.Generator().manual_seed(seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            down = torch.randn(RANK, part.in_features, generator=noise)
            up = torch.randn(part.out_features, RANK, generator=noise)
        elif isinstance(part, nn.Conv2d) and part.groups == 1:
            down = torch.randn(RANK, part.in_channels, *part.kernel_size, generator=noise)
            up = torch.randn(part.out_channels, RANK, 1, 1, generator=noise)
        else:
            continue
        found[name] = (0.1 * down, 0.1 * up)
        if only is not None and len(found) == only:
            break
    return found


def delta(down: Tensor, up: Tensor) -> Tensor:
    """Return up @ down, shaped like the weight."""
    return (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


def peft_file(layers: dict[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    """Return a state dict as Diffusers and PEFT write it, without alphas."""
    state = {}
    for name, (down, up) in layers.items():
        state[f"{prefix}.{name}.lora_A.weight"] = down
        state[f"{prefix}.{name}.lora_B.weight"] = up
    return state


def kohya_file(layers: dict[str, tuple[Tensor, Tensor]], alpha: float | None) -> dict[str, Tensor]:
    """Return a state dict as kohya's scripts write it."""
    state = {}
    for name, (down, up) in layers.items():
        stem = "lora_unet_" + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
    return state


def write_checkpoint(row: Row, pipe: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Write a row's files with random weights of this pipeline's structure; return the changes they mean.

    LoRA files of U-Nets are kohya's, with alpha 1 where the row says that the file has alphas; others are
    PEFT's, without. The change of a layer is up @ down times the scale that follows.
    """
    changes = {}
    for index, weights in enumerate(row.weights):
        if row.kind == "pipeline":
            continue
        module = getattr(pipe, weights.component)
        target = folder / Path(weights.file).name
        if row.kind in ("denoiser", "motion"):
            part = "motion_modules" if row.kind == "motion" else ""
            state = {name: value + 0.01 for name, value in module.state_dict().items() if part in name}
            changes[weights.component] = dict(state)
        else:
            layers = factors(module, seed=index)
            with_alpha = row.alpha == "file"
            state = (
                kohya_file(layers, 1.0 if with_alpha else None)
                if weights.component == "unet"
                else peft_file(layers, weights.component.removesuffix("_2"))
            )
            scale = 1.0 / RANK if with_alpha else row.lora_scale
            changes[weights.component] = {
                f"{name}.weight": scale * delta(*pair) for name, pair in layers.items()
            }
        _write(state, target)
    return changes


def _write(state: dict[str, Tensor], path: Path) -> None:
    state = {name: value.contiguous().clone() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save({"state_dict": state}, path)


def recipe(folder: Path, layers: dict[str, tuple[Tensor, Tensor]], **values: Any) -> Path:
    """Write a folder with a LoRA for a U-Net and its recipe.json, as a trainer does; return the folder."""
    save_file(peft_file(layers, "unet"), str(folder / "adapter.safetensors"))
    document = {
        "format": "few-step-recipe",
        "version": 1,
        "name": "student-4",
        "family": "sd15",
        "weights": [{"file": "adapter.safetensors", "component": "unet"}],
        "steps": [4],
        "scheduler": "ListedDDIMScheduler",
        "timesteps": {"4": [999, 749, 499, 249]},
        "eta": 0.0,
        "licence": "apache-2.0",
        "source": "a test",
        **values,
    }
    (folder / "recipe.json").write_text(json.dumps(document), "utf-8")
    return folder


@dataclass
class Seen:
    """What the denoisers of a pipeline were called with: rows and timestep of every call."""

    rows: list[int] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)


@contextmanager
def watched(pipe: Any) -> Iterator[Seen]:
    """Watch the network's calls; timesteps are counted to 1000 whatever the family writes."""
    seen, hooks = Seen(), []
    scale = TOLD.get(family_of(pipe), lambda t: t)

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = [*args, *kwargs.values()]
        first = next(v for v in values if isinstance(v, list) or getattr(v, "ndim", 0) >= 1)
        told = kwargs.get("timestep", kwargs.get("timesteps"))
        told = kwargs.get("t", args[1] if len(args) > 1 else None) if told is None else told
        seen.rows.append(len(first))
        seen.timesteps.append(round(float(scale(torch.as_tensor(told).double().flatten()[0])), 2))

    for module in denoisers(pipe):
        hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def everything(pipe: Any) -> dict[str, Any]:
    """Return copies of all weights of the denoisers, and the identities that an undo has to give back."""
    found: dict[str, Any] = {
        "scheduler": id(pipe.scheduler),
        "class": type(pipe),
        "config": dict(pipe.config),
    }
    for index, module in enumerate(denoisers(pipe)):
        found[f"hooks {index}"] = len(module._forward_pre_hooks)
        found |= {f"{index}.{name}": value.clone() for name, value in module.state_dict().items()}
        found |= {f"{index}.{name} is": type(part) for name, part in module.named_modules()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise AssertionError where anything differs, by a single bit."""
    assert list(before) == list(after)
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name
