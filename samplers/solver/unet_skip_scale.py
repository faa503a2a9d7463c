"""Skip coefficients of a schedule: what a U-Net's encoder hands over is scaled before the decoder takes it.

They change the model, not the solver (the released code of arXiv 2312.07243; FreeU is a relative): entry j
belongs to skip connection j in the order of the encoder, so that the last one is used first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

__all__ = ["scaled_skips", "skip_count"]

HANDED = "res_hidden_states_tuple"


def skip_count(unet: Any) -> int:
    """How many skip connections a U-Net of Diffusers has; 0 for other networks."""
    blocks = getattr(unet, "up_blocks", None) or ()
    return sum(len(getattr(block, "resnets", ())) for block in blocks)


@contextmanager
def scaled_skips(pipe: Any, skips: Sequence[float] | None) -> Iterator[None]:
    """Inside the block the U-Net's skip connections are scaled; None, or ones, leave it as it is.

    Raises ValueError for a pipeline without a U-Net, and for another number of connections than it has.
    """
    with ExitStack() as undo:
        if skips is not None and any(value != 1 for value in skips):
            for block, part in _parts(pipe, skips):
                hook = block.register_forward_pre_hook(partial(_scaled, part), with_kwargs=True)
                undo.callback(hook.remove)
        yield


def _parts(pipe: Any, skips: Sequence[float]) -> list[tuple[Any, Sequence[float]]]:
    """The decoder's blocks, each with the coefficients of what it is handed."""
    unet = getattr(pipe, "unet", None)
    count = skip_count(unet)
    if count != len(skips):
        what = f"a U-Net with {count} skip connections" if count else "no U-Net with skip connections"
        raise ValueError(
            f"the schedule has {len(skips)} skip coefficients, {type(pipe).__name__} has {what}: it was made "
            "for another model; drop them with dataclasses.replace(schedule, skips=None)"
        )
    found: list[tuple[Any, Sequence[float]]] = []
    left = count
    for block in unet.up_blocks:  # type: ignore[union-attr]
        taken = len(block.resnets)
        found.append((block, tuple(skips[left - taken : left])))
        left -= taken
    return found


def _scaled(
    part: Sequence[float], block: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    handed = kwargs[HANDED]
    return args, {**kwargs, HANDED: tuple(x * c for x, c in zip(handed, part, strict=True))}
