"""A pipeline for each thread, all over the same weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

__all__ = ["sibling"]


def sibling(pipe: Any) -> Any:
    """Return a pipeline with the same weights and all else of its own, for another thread.

    It costs some hundredths of a second for each network and large tokenizer, and a few megabytes of modules.
    What is plugged into one of the two, in its sampler or inside its networks, is not in the other; what
    writes into weights (a fused few-step LoRA, `SaRAWeights`) works on copies while it is plugged in.
    Diffusers' own `pipe.fuse_lora()` knows nothing of that and writes into the weights of all: fuse before
    the first sibling is taken, or keep adapters unfused (`set_adapters`), which are each sibling's own.
    Tokenizers cannot be shared: a fast one writes each call's padding into itself, and another thread's
    prompt then has the wrong length.

    Move the pipeline to its device first, and compile each sibling on its own: a network that is compiled
    already, or under hooks of offloading, is shared whole, with a warning. Raises ValueError while something
    is plugged into the pipeline, for the copy would keep half of it.
    """
    from torch.nn import Module

    from diffplug.network.shared_weights import twins
    from diffplug.plug import plugged_names

    if names := plugged_names(pipe):
        raise ValueError(f"{', '.join(names)} is plugged in: undo it before the pipeline is copied")
    parts, changing = pipe.components, _changed_by_a_call()
    networks, whole = twins({name: part for name, part in parts.items() if isinstance(part, Module)})
    if whole:
        warnings.warn(
            f"{', '.join(whole)}: compiled or under hooks of offloading, so siblings share it whole, and "
            "what one of them plugs into it acts on all: take siblings first, and compile each",
            stacklevel=2,
        )
    own = {
        name: copy.deepcopy(part)
        for name, part in parts.items()
        if name == "scheduler" or isinstance(part, changing)
    }
    accepted = inspect.signature(type(pipe).__init__).parameters
    settings = {name: value for name, value in pipe.config.items() if name in accepted}
    twin = type(pipe)(**{**settings, **parts, **own, **networks})
    if (home := pipe.config.get("_name_or_path")) is not None:
        twin.register_to_config(_name_or_path=home)
    twin.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return twin


def _changed_by_a_call() -> tuple[type, ...]:
    """The kinds of parts, besides networks, that a call of the pipeline writes into."""
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    return SchedulerMixin, PreTrainedTokenizerBase, ProcessorMixin
