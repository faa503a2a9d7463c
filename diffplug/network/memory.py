"""What to do when memory runs out: recognise it, free what can be freed, try less."""

from __future__ import annotations

import gc
from typing import Any

__all__ = ["is_out_of_memory", "release_memory"]

_WORDS = ("out of memory", "can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED", "Allocation failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on whatever device."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release_memory() -> None:
    """Give the cached memory of accelerators back; call it when the error and its frames are gone."""
    import torch

    gc.collect()
    for name in ("cuda", "mps", "xpu"):
        back_end: Any = getattr(torch, name, None)
        if back_end is not None and hasattr(back_end, "empty_cache") and back_end.is_available():
            back_end.empty_cache()
