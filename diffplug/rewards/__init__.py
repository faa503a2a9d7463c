"""Rewards: what a picture is worth to somebody.

A reward is any callable `reward(images, prompts) -> scores`: `images` are [n, 3, h, w] float32 in [0, 1],
`prompts` a list of n strings, the scores n numbers, larger is better. Tensor, array and list are all welcome.
One that keeps the graph of pictures that require gradients says so by an attribute `differentiable = True`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffplug.lazy import hand_on
from diffplug.registry import REWARDS

if TYPE_CHECKING:
    from diffplug.rewards.compose import Standardised as Standardised
    from diffplug.rewards.compose import Weighted as Weighted
    from diffplug.rewards.spec import parse as parse

__all__ = [
    "Reward",
    "Standardised",
    "Weighted",
    "ask",
    "check_prompts",
    "get",
    "names",
    "parse",
    "prepare",
    "score",
]

Reward = Callable[[torch.Tensor, list[str]], Any]


def names() -> list[str]:
    """The names that `get` knows, those of other packages' entry points included."""
    return REWARDS.names()


def get(name: str, **options: Any) -> Reward:
    """The reward of that name, ready to call; `options` go to its constructor.

    `name` may also be a spec without options, as "0.7*clip + 0.3*aesthetic" (see `diffplug.rewards.spec`).
    Raises ValueError with the nearest names for an unknown one.
    """
    if name not in REWARDS:
        if options:
            raise ValueError(
                f"reward {name!r} is no plain name and takes no options, got {', '.join(options)}"
            )
        return __getattr__("parse")(name)
    return built(name, REWARDS.get(name), **options)


RAISED_BY = "_diffplug_reward"
"""Attribute of an error that a reward raised: the reward's name."""


def built(name: str, found: Any, **options: Any) -> Reward:
    """The reward of a registered class with its options, or the registered function itself.

    Raises ValueError for a class that cannot be built from a name alone (its attribute `needs` says what is
    missing), and for options of a function.
    """
    if isinstance(found, type):
        if not options and (needs := getattr(found, "needs", "")):
            raise ValueError(f"reward {name!r} needs {needs}")
        return found(**options)
    if options:
        raise ValueError(f"reward {name!r} is a function and takes no options, got {', '.join(options)}")
    return found


def score(reward: Reward, images: Any, prompts: Sequence[Any], *, graph: bool = False) -> torch.Tensor:
    """What `reward` gives for n pictures, as [n] float64 on the CPU; costs one call of the reward.

    In a loop of one's own (`diffplug.steering.Crowd`) they are n things of any kind, and labels for prompts.

    The scores are detached unless `graph` is set and the reward returned a tensor with a graph. NaN and
    infinities stay (a `None` in a list counts as NaN): the caller decides what they mean. Raises
    ValueError that names the reward where it returns anything but n numbers, or [n, 1] of them.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts: give one prompt for each image")
    shown = images.clone() if isinstance(images, torch.Tensor) else images  # it may write into pictures
    try:
        returned = ask(reward, shown, list(prompts))
    except Exception as error:
        vars(error).setdefault(RAISED_BY, _name(reward))  # for who tells it to a person
        raise
    scores = _numbers(returned, graph)
    if scores is not None and scores.shape == (len(images), 1):
        scores = scores[:, 0]
    if scores is None or scores.shape != (len(images),):
        raise ValueError(
            f"reward {_name(reward)} must return {len(images)} numbers for {len(images)} images, "
            f"it returned {_described(returned)}"
        )
    return scores


def ask(reward: Reward, images: torch.Tensor, prompts: list[str]) -> Any:
    """Return what a reward returns; one whose arguments are named (prompts, images) gets them that way."""
    try:
        named = list(inspect.signature(reward).parameters)[:2]
    except (TypeError, ValueError):  # built-in functions have none
        named = []
    return reward(prompts, images) if named == ["prompts", "images"] else reward(images, prompts)  # type: ignore[arg-type]


def prepare(reward: Any) -> None:
    """Load what a reward needs, if it says how (`reward.prepare()`), so that bad weights are told early."""
    own = getattr(reward, "prepare", None)
    if callable(own):
        own()


def check_prompts(reward: Any, prompts: Sequence[str]) -> None:
    """Raise ValueError for prompts that a reward cannot read, if it says so (`reward.check_prompts(...)`)."""
    own = getattr(reward, "check_prompts", None)
    if callable(own):
        own(prompts)


def _numbers(returned: Any, graph: bool) -> torch.Tensor | None:
    """`returned` as a float64 tensor on the CPU; None if it holds something else than real numbers."""
    if isinstance(returned, torch.Tensor):
        kept = returned if graph else returned.detach()
        return None if kept.is_complex() else kept.to("cpu").to(torch.float64)
    if isinstance(returned, (list, tuple)):
        returned = [math.nan if value is None else _plain(value) for value in returned]
    try:
        array = np.asarray(returned)
        return None if array.dtype.kind not in "biuf" else torch.from_numpy(array.astype(np.float64))
    except (TypeError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """A one-element tensor as a number, anything else as it is."""
    return value.detach().item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _name(reward: Any) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def _described(returned: Any) -> str:
    shape = getattr(returned, "shape", None)
    if shape is not None:
        return f"{type(returned).__name__} of shape {tuple(shape)}"
    if isinstance(returned, (list, tuple)) and any(isinstance(value, str) for value in returned):
        return f"texts, as {next(value for value in returned if isinstance(value, str))!r}"
    return (
        f"{type(returned).__name__} of length {len(returned)}"
        if hasattr(returned, "__len__")
        else repr(returned)
    )


_HOMES = {
    "Standardised": "diffplug.rewards.compose",
    "Weighted": "diffplug.rewards.compose",
    "parse": "diffplug.rewards.spec",
}
__getattr__, _ = hand_on(__name__, _HOMES)
