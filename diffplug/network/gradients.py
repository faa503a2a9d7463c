"""Gradients through the call of a pipeline as it stands, for the few numbers of a sampler.

Pipelines of Diffusers switch gradients off around their call; what is written below that switch is
differentiable all the same. Nothing of the model learns: its weights are frozen meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffplug.intercept import PipelineCall, Undo, intercept_call, original_class
from diffplug.network.denoiser import denoisers, wrap_forward

__all__ = ["WithGraph", "differentiable"]


@contextmanager
def differentiable(pipe: Any, *, checkpoints: bool = True) -> Iterator[WithGraph]:
    """A block in which the pipeline's weights are frozen; yields the plug that lets gradients through.

    The plug goes last into `plug(pipe, ...)`, and backward passes belong into the block. checkpoints: keep
    one evaluation's activations in memory at a time and compute them again on the way back (arXiv
    1604.06174), which costs an evaluation more for each.
    """
    with ExitStack() as changes:
        for module in _modules(pipe):
            _freeze(module, changes)
        if checkpoints:
            for module in denoisers(pipe):
                changes.callback(wrap_forward(module, _computed_again))
        yield WithGraph()


class WithGraph:
    """A plug: what the pipeline returns carries a graph back to whatever asks for gradients in its call."""

    def attach(self, pipe: Any) -> Undo:
        """A function that switches gradients off again."""
        return intercept_call(pipe, _with_graph, innermost=True)


def _with_graph(call: PipelineCall, kwargs: dict[str, Any]) -> Any:
    """The call of the pipeline below its `no_grad`."""
    with torch.enable_grad():
        return inspect.unwrap(original_class(call.pipe).__call__)(call.pipe, **kwargs)


def _modules(pipe: Any) -> list[nn.Module]:
    """The networks of a pipeline."""
    parts = getattr(pipe, "components", None) or vars(pipe)
    return [part for part in parts.values() if isinstance(part, nn.Module)]


def _freeze(module: nn.Module, changes: ExitStack) -> None:
    for weight in module.parameters():
        if weight.requires_grad:
            weight.requires_grad_(False)
            changes.callback(weight.requires_grad_, True)


def _computed_again(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
