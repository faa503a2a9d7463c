"""Which tensors SaRA may choose from, and models that it cannot work with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from diffplug.registry import unknown
from diffplug.sara.targets import named_weights, refuse_fused, refuse_unusable
from diffplug.training.tuners.sara.distributed import refuse_wrapped

__all__ = ["candidates", "checked", "listed", "matches", "warn_if_compiled"]


def checked(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules without a compiled shell; ValueError for wrapped models and fused LoRAs."""
    out = {}
    for name, module in modules.items():
        refuse_wrapped(module)
        warn_if_compiled(name, module)
        refuse_fused(name, module)
        out[name] = getattr(module, "_orig_mod", module)
    return out


def warn_if_compiled(name: str, module: nn.Module) -> None:
    """Warn of a module whose backward pass is one compiled graph."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        warnings.warn(
            f"{name} is compiled as a whole, which keeps all dense gradients until the end of the backward "
            "pass: train it eagerly, or use compile_repeated_blocks()",
            stacklevel=5,
        )


def candidates(
    modules: Mapping[str, nn.Module],
    include: Sequence[str] | str,
    exclude: Sequence[str] | str,
    include_1d: bool,
) -> dict[str, nn.Parameter]:
    """Return the tensors to choose from by "component.parameter"; ValueError for what cannot be trained."""
    every: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for component, module in modules.items():
        for name, weight in named_weights(module).items():
            if id(weight) not in seen:
                seen.add(id(weight))
                every[f"{component}.{name}"] = weight
    wanted, left = listed(include), listed(exclude)
    _refuse_idle([*wanted, *left], list(every))
    found = {
        name: weight
        for name, weight in every.items()
        if (weight.ndim > 1 or include_1d)
        and (not wanted or matches(name, wanted))
        and not matches(name, left)
    }
    if not found:
        raise ValueError("include and exclude leave no tensor to train: leave some out")
    for name, weight in found.items():
        refuse_unusable(name, weight)
    return found


def listed(patterns: Sequence[str] | str) -> list[str]:
    """Return one pattern, or several, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def _refuse_idle(patterns: Sequence[str], names: list[str]) -> None:
    """Raise ValueError for a pattern that matches no tensor."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            blocks = {name.rpartition(".")[0].split(".", 1)[-1] for name in names}
            tops = {".".join(name.split(".")[1:3]) for name in names}
            raise unknown("tensor or block", pattern, sorted(tops | blocks if len(blocks) < 40 else tops))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name, with or without its component, is a pattern, lies below it, or fits it."""
    short = name.split(".", 1)[1]
    return any(
        one == p or one.startswith(f"{p}.") or fnmatchcase(one, p) for p in patterns for one in (name, short)
    )
