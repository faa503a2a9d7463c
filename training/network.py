"""The denoiser of a pipeline as objectives call it: states at indices in, x0 and eps out, with any weights.

    said = network(x, index, conditions)                  # the weights that learn
    said = network(x, index, conditions, average)         # an average, an earlier student, a second network
    said = network.original(x, index, conditions)         # the model as it was
    said = network.guided(x, index, conditions, scale)    # the model as it was, with guidance

Any weights means: tensors under the names of `tuner.parameters`. They are put into the call, not into the
network (`torch.func.functional_call`), so nothing has to be copied, switched or restored, and gradients reach
them where they ask for some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.noise.prediction import mean_channels
from diffplug.training.conditions import CallForm, Conditions
from diffplug.training.noise_path import NoisePath, Prediction
from diffplug.training.tuner import Tuner

__all__ = ["Network"]

Weights = Mapping[str, Tensor]


class Network:
    """A denoiser with a tuner attached.

    form: how its pipeline calls it. null: the condition without a prompt, one row; needed for `guided`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        path: NoisePath,
        form: CallForm,
        tuner: Tuner,
        null: Conditions | None = None,
    ) -> None:
        self.denoiser, self.path, self.form, self.tuner, self.null = denoiser, path, form, tuner, null

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that learn, by name."""
        return self.tuner.parameters

    def copies(self) -> dict[str, Tensor]:
        """Return copies of the weights that learn, as leaves that may learn something else."""
        return {name: value.detach().clone().requires_grad_() for name, value in self.weights.items()}

    def __call__(
        self, x: Tensor, index: Tensor, conditions: Conditions, weights: Weights | None = None
    ) -> Prediction:
        """Return what the network says of states x [n, ...] at indices [n]; float32, with a graph."""
        told = self.path.timesteps(index).to(x.device, torch.float32)
        kwargs = self.form.arguments(x, told, conditions.to(x.device, x.dtype))
        if weights is None:
            out = self.denoiser(**kwargs)[0]
        else:
            with _no_recomputation(self.denoiser):
                out = torch.func.functional_call(self.denoiser, dict(self.tuner.placed(weights)), (), kwargs)[
                    0
                ]
        return self.path.predict(self.form.sign * mean_channels(out, x).to(x.dtype), x, index)

    @torch.no_grad()
    def original(self, x: Tensor, index: Tensor, conditions: Conditions) -> Prediction:
        """Return what the model said before it was tuned; without gradients."""
        with self.tuner.original():
            return self(x, index, conditions)

    @torch.no_grad()
    def guided(
        self, x: Tensor, index: Tensor, conditions: Conditions, scale: Any
    ) -> tuple[Prediction, Prediction, Prediction]:
        """Return what the original says with guidance, with the prompt alone, and without a prompt.

        scale: guidance as in Diffusers, one number or [n]; out = null + scale (prompt - null). Two rows each.
        """
        n = len(x)
        if self.null is None:
            raise ValueError("guidance needs the condition without a prompt: give Network its `null`")
        both = Conditions.cat([self.null.to(x.device, x.dtype).expand(n), conditions.to(x.device, x.dtype)])
        said = self.original(torch.cat([x, x]), torch.cat([index, index]), both)
        free, told = Prediction(said.x0[:n], said.eps[:n]), Prediction(said.x0[n:], said.eps[n:])
        g = torch.as_tensor(scale, dtype=x.dtype, device=x.device).view(-1, *(1,) * (x.ndim - 1))
        x0, eps = (b + g * (a - b) for a, b in ((told.x0, free.x0), (told.eps, free.eps)))
        return Prediction(x0, eps), told, free

    @contextmanager
    def holding(self, weights: Weights) -> Iterator[None]:
        """A block in which the denoiser itself has these weights, for runs of its pipeline."""
        own = {name: value.detach().clone() for name, value in self.weights.items()}
        self.put(weights)
        try:
            yield
        finally:
            self.put(own)

    @torch.no_grad()
    def put(self, weights: Weights) -> None:
        """Give the denoiser these weights."""
        for name, value in self.weights.items():
            value.copy_(weights[name])


@contextmanager
def _no_recomputation(denoiser: nn.Module) -> Iterator[None]:
    """A block without gradient checkpointing, which would compute again with other weights."""
    parts = [part for part in denoiser.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True  # type: ignore[assignment]
