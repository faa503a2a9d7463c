"""What "idle" means: a score for every weight, of which the smallest are trained.

The default is the magnitude, which needs no data (arXiv 2409.06633). A score is a function of a tensor's name
and values that returns a tensor of its shape; it must say the same whenever it is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.registry import unknown
from diffplug.sara.targets import named_weights

__all__ = ["SCORES", "Score", "activation_score", "gradient_score", "of_parameters", "score_of"]

Score = Callable[[str, Tensor], Tensor]


def _magnitude(name: str, weight: Tensor) -> Tensor:
    return weight.abs()


def _largest(name: str, weight: Tensor) -> Tensor:
    return -weight.abs()


def _random(seed: int) -> Score:
    def score(name: str, weight: Tensor) -> Tensor:
        word = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(word))
        return drawn.to(weight.device)

    return score


SCORES = ("magnitude", "random", "largest")


def score_of(score: str | Score, seed: int = 0) -> Score:
    """Return the score that a name stands for; ValueError with the nearest for an unknown one."""
    if callable(score):
        return score
    if score not in SCORES:
        raise unknown("score", score, list(SCORES), "A function (name, weight) -> scores works as well.")
    return {"magnitude": _magnitude, "random": _random(seed), "largest": _largest}[score]


def of_parameters(score: Score) -> Score:
    """Return a score for names with a component before them, which scores do not know."""
    return lambda name, weight: score(name.split(".", 1)[1], weight)


def gradient_score(module: nn.Module, loss: Callable[[], Tensor], batches: int = 1) -> Score:
    """Return a score that is smallest where |gradient| is largest, from `batches` calls of `loss`.

    The weights that the new data pull at most (Fisher information, as SPEFT, arXiv 2412.13488, finds best for
    language models). Costs a dense gradient once, kept on the CPU.
    """
    weights = named_weights(module)
    flags = {name: value.requires_grad for name, value in weights.items()}
    for value in weights.values():
        value.requires_grad_(True)
    totals = {name: torch.zeros(value.shape) for name, value in weights.items()}
    try:
        for _ in range(batches):
            grads = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
            for name, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    totals[name] += grad.detach().float().cpu().square()
    finally:
        for name, value in weights.items():
            value.requires_grad_(flags[name])
    return _by_name({name: -total.sqrt() for name, total in totals.items()})


def activation_score(module: nn.Module, run: Callable[[], Any]) -> Score:
    """Return |w| times the norm of the inputs that it meets, per input channel, while `run()` runs.

    Of linear and convolution layers (Wanda, arXiv 2306.11695); other tensors keep their magnitude.
    """
    norms: dict[str, Tensor] = {}
    layers = {n: part for n, part in module.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}

    def watching(name: str, axis: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().float().movedim(axis, -1).flatten(0, -2)
            norms[name] = norms.get(name, torch.zeros(())) + x.square().sum(0).cpu()

        return hook

    hooks = [
        part.register_forward_pre_hook(watching(name, 1 if isinstance(part, nn.Conv2d) else -1))
        for name, part in layers.items()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()

    def score(name: str, weight: Tensor) -> Tensor:
        norm = norms.get(name.rpartition(".")[0])
        if norm is None or weight.ndim < 2 or weight.shape[1] != len(norm):
            return weight.abs()
        scale = norm.sqrt().to(weight.device)
        return weight.abs().float() * scale.view(1, -1, *(1,) * (weight.ndim - 2))

    return score


def _by_name(found: Mapping[str, Tensor]) -> Score:
    def score(name: str, weight: Tensor) -> Tensor:
        if name not in found:
            raise unknown(
                "tensor of the score", name, sorted(found), "Make the score of the module that is tuned."
            )
        return found[name].to(weight.device)

    return score
