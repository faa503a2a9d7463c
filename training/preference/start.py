"""A policy on top of a few-step student: the student is the reference, and the file holds both.

The reference of a tuned LoRA student is "distillation on, policy off". So the student's weights go into the
base before the tuner is attached, and what is saved is one LoRA again: the two updates B1 A1 + B2 A2 are one
product of concatenated factors, without any loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.lora_file import Layer, is_lora, read_lora
from diffplug.samplers.few_step.weights_file import located, read_weights
from diffplug.training.conditions import one_denoiser
from diffplug.training.tuner import Tuner
from diffplug.training.tuners.by_name import tuner_of
from diffplug.training.tuners.earlier_student import student_row
from diffplug.training.tuners.extract import extract_lora
from diffplug.training.tuners.full import FullTuner
from diffplug.training.tuners.lora import LoraTuner, write_lora

__all__ = ["OnTop", "policy"]

Factors = dict[str, tuple[Tensor, Tensor]]


class OnTop:
    """A tuner over a student whose weights are in the base already.

    inner: what moves. factors: the student's (down, up) by layer, scales applied; empty for a student of all
    weights. base: the weights below the student, needed to cut a LoRA of `extract` from an inner full tuner.
    """

    def __init__(
        self, inner: Tuner, factors: Factors, base: Mapping[str, Tensor], extract: int | None, dtype: str
    ) -> None:
        self.inner, self.factors, self.base, self.extract, self.dtype = inner, factors, base, extract, dtype

    def attach(self, denoiser: nn.Module) -> None:
        """Nothing to do: `policy` has attached the inner tuner."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The inner tuner's."""
        return self.inner.parameters

    def placed(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As the inner tuner says."""
        return self.inner.placed(weights)

    def original(self) -> AbstractContextManager[None]:
        """Return a block in which the student is as it was."""
        return self.inner.original()

    def updated(self, update: int) -> None:
        """Tell the inner tuner."""
        self.inner.updated(update)

    def save(self, pipe: Any, weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
        """Write student and policy as one file."""
        if isinstance(self.inner, LoraTuner) and self.factors:
            return self._joined(pipe, self.inner, weights, folder)
        if isinstance(self.inner, FullTuner) and self.extract is not None:
            return extract_lora(pipe, self.base, weights, self.extract, folder, self.dtype)
        return self.inner.save(pipe, weights, folder)

    def _joined(
        self, pipe: Any, inner: LoraTuner, weights: Mapping[str, Tensor], folder: Path
    ) -> dict[str, Any]:
        both = joined(self.factors, _factors_of(weights, inner.alpha / inner.rank))
        named, ranks = {}, {}
        for layer, (down, up) in both.items():
            named[f"{layer}.lora_A.weight"], named[f"{layer}.lora_B.weight"] = down, up
            ranks[layer] = len(down)
        top = max(ranks.values())
        smaller = {layer: rank for layer, rank in ranks.items() if rank != top}
        config = {"r": top, "lora_alpha": top, "rank_pattern": smaller, "alpha_pattern": smaller}
        return write_lora(pipe, named, config, folder, getattr(torch, self.dtype))


def policy(job: Any) -> Tuner:
    """Return the tuner of a job's config, on top of the student that student.start names, if any.

    A few-step name begins from its published file, where that is in the hub's cache or can be loaded. Raises
    ValueError for a start that is no student of this model.
    """
    told, start = job.config.tuner, job.config.student.start
    denoiser = one_denoiser(job.pipe)
    factors: Factors = {}
    base: dict[str, Tensor] = {}
    if start is not None:
        if told.kind not in ("lora", "full"):
            raise ValueError(
                f"tuner.kind={told.kind} cannot begin from a student ({start!r}), since its file would hold "
                "only half of the result: take lora or full, or leave student.start out"
            )
        row = student_row(job.pipe, start, job.config.student.steps)
        if told.kind == "full":
            base = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
        factors = put_in(denoiser, _file_of(row, start), pipe=job.pipe, trained_scale=row.lora_scale)
    torch.manual_seed(job.config.run.seed)
    inner = tuner_of(told)
    inner.attach(denoiser)
    return inner if start is None else OnTop(inner, factors, base, told.extract, told.save_dtype)


def _file_of(row: Row, start: str) -> Path:
    """Return the file of a student; ValueError where it is not one, or not to be had."""
    if row.kind not in ("lora", "denoiser") or len(row.weights) != 1:
        raise ValueError(
            f"student.start: {start!r} is no student in one file of weights (kind {row.kind!r}): give a "
            "model that is few-step by itself as `model`"
        )
    return located(row, row.weights[0])


@torch.no_grad()
def put_in(denoiser: nn.Module, file: Path, *, pipe: Any = None, trained_scale: float = 1.0) -> Factors:
    """Add a student's weights to the denoiser, in float32; return the factors of a LoRA.

    file: of this package, or published: whatever `FewStep` reads. trained_scale: alpha / rank where the file
    tells no alpha. Raises ValueError for weights of another model, and for a LoRA with more than factors.
    """
    (found, metadata), own = read_weights(file), dict(denoiser.named_parameters())
    if not is_lora(found):
        odd = [n for n, v in own.items() if n not in found or found[n].shape != v.shape]
        if odd:
            raise ValueError(f"{str(file)!r} belongs to another model: {odd[0]!r} is missing or differs")
        for name, value in own.items():
            value.data = found[name].to(value.device, value.dtype)
        return {}
    told: dict[str, Any] = {"trained_scale": trained_scale, "metadata": metadata, "what": repr(str(file))}
    lora = read_lora(found, denoiser, pipeline=type(pipe) if pipe is not None else None, **told)
    factors = {layer: _in_shape(file, layer, part, own) for layer, part in lora.layers.items()}
    for layer, (down, up) in factors.items():
        weight = own[f"{layer}.weight"]
        change = (up.flatten(1) @ down.flatten(1)).view_as(weight)
        weight.copy_(weight.float() + change.to(weight.device))  # rounded once, if at all
    return factors


def _in_shape(file: Path, name: str, layer: Layer, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a layer's factors, float32, shaped as adapters of its weight are."""
    weight = own.get(f"{name}.weight")
    if layer.down is None or layer.up is None or layer.bias is not None or layer.diff is not None:
        raise ValueError(
            f"{str(file)!r} changes {name!r} by more than two factors, which the tuned file could not hold: "
            "merge it into the model first"
        )
    if weight is None or (weight.shape[0], weight[0].numel()) != (layer.up.shape[0], layer.down[0].numel()):
        raise ValueError(f"{str(file)!r} belongs to another model: layer {name!r} does not fit")
    rank, ones = layer.rank, (1,) * (weight.ndim - 2)
    down = layer.down.float().reshape(rank, *weight.shape[1:])
    return down, layer.up.float().reshape(weight.shape[0], rank, *ones)


def _factors_of(weights: Mapping[str, Tensor], scale: float) -> Factors:
    """Return the factors of a tuner's parameters, "layer.lora_A.student.weight"."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".lora_")
        found.setdefault(layer, {})[part[0]] = value.detach().float().cpu()
    return {layer: (both["A"], scale * both["B"]) for layer, both in found.items()}


def joined(one: Factors, other: Factors) -> Factors:
    """Return the factors of the sum of two low-rank updates."""
    out = dict(one)
    for layer, (down, up) in other.items():
        if layer in one:
            down, up = torch.cat([one[layer][0], down]), torch.cat([one[layer][1], up], dim=1)
        out[layer] = (down, up)
    return out
