"""The denoising networks of a pipeline: which they are, what stands around their forward, what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import get_ident
from time import perf_counter
from typing import Any

__all__ = ["NetworkCount", "count_network", "denoisers", "wrap_forward"]

_DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")


@dataclass
class NetworkCount:
    """Forward passes of the denoiser: `calls`, `rows` (batch rows summed over calls) and host `seconds`.

    Classifier-free guidance doubles the rows, not the calls. On an accelerator the seconds only launch work.
    """

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


@contextmanager
def count_network(pipe: Any) -> Iterator[NetworkCount]:
    """A NetworkCount that grows while the block runs; one hook per denoiser, removed at the end.

    What other threads do with the same weights is not counted.
    Raises ValueError for a pipeline in which no denoiser is found.
    """
    count = NetworkCount()
    with ExitStack() as hooks:
        for module in denoisers(pipe):
            _count_module(module, count, hooks)
        yield count


def denoisers(pipe: Any) -> list[Any]:
    """The denoising networks of a pipeline (U-Net, transformer, both experts of Wan 2.2), each once."""
    found = [getattr(pipe, name, None) for name in _DENOISERS]
    unique = {id(module): module for module in found if hasattr(module, "register_forward_pre_hook")}
    if not unique:
        raise ValueError(
            f"no denoiser found in {type(pipe).__name__}: looked for the components {', '.join(_DENOISERS)}"
        )
    return list(unique.values())


def wrap_forward(module: Any, around: Callable[..., Any]) -> Callable[[], None]:
    """Make a network's forward `around(forward, *args, **kwargs)`; return the function that undoes it.

    A forward of its own, such as an offloading hook of Accelerate, stays inside and comes back.
    """
    own, forward = vars(module).get("forward"), module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(forward, *args, **kwargs)

    def undo() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    module.forward = wrapped
    return undo


def _count_module(module: Any, count: NetworkCount, hooks: ExitStack) -> None:
    started: list[float] = []
    mine = get_ident()

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != mine:
            return
        count.calls += 1
        count.rows += _rows([*args, *kwargs.values()])
        started.append(perf_counter())

    def after(*_: Any) -> None:
        if started and get_ident() == mine:
            count.seconds += perf_counter() - started.pop()

    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    hooks.callback(module.register_forward_hook(after, always_call=True).remove)


def _rows(values: list[Any]) -> int:
    """Rows of the first batched argument: a tensor's first axis, or the length of a list of tensors."""
    for value in values:
        if getattr(value, "ndim", 0) >= 1:
            return int(value.shape[0])
        if isinstance(value, (list, tuple)) and value and hasattr(value[0], "shape"):
            return len(value)
    return 0
