"""What commands have in common: the pipeline on its device, and prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import diffplug
from diffplug.cli.console import hush
from diffplug.registry import unknown


@dataclass(frozen=True)
class Memory:
    """How to make do with less memory: weights that wait on the host, a decoder that works in parts."""

    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False

    def __post_init__(self) -> None:
        if self.offload not in _OFFLOADS:
            raise unknown("offload", self.offload, list(_OFFLOADS))

    def place(self, pipe: Any, where: str) -> Any:
        """Return the pipeline on its device, as sparing as asked for."""
        for wanted, name in ((self.vae_tiling, "tiling"), (self.vae_slicing, "slicing")):
            if wanted:
                _spare_decoder(pipe, name)
        if self.offload == "none":
            return pipe.to(where)
        if where == "cpu":
            raise ValueError(
                f"--offload {self.offload} moves weights to an accelerator and back: leave it out on cpu"
            )
        getattr(pipe, _OFFLOADS[self.offload])(device=where)
        return pipe


_OFFLOADS = {
    "none": "",
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
}


def _spare_decoder(pipe: Any, name: str) -> None:
    enable = getattr(getattr(pipe, "vae", None), f"enable_{name}", None)
    if enable is None:
        raise ValueError(f"--vae-{name}: {type(pipe).__name__} has no decoder that can do it: leave it out")
    enable()


def load_pipeline(
    model: str, device: str, dtype: str, prompts: Sequence[str], memory: Memory | None = None
) -> Any:
    """Return the pipeline on its device; warn of words that are not known to it, or not read."""
    hush()
    where = device_of(device)
    pipe = diffplug.load(model, **_dtype(dtype_of(dtype, model, where)))
    if model == "shapes":
        _warn_of_unknown_words(prompts)
    warn_of_unread_words(pipe, prompts)
    return (memory or Memory()).place(pipe, where)


def dtype_of(name: str, model: str, where: str) -> str:
    """Return the dtype's name; auto is bfloat16 where the model is not small."""
    known = ["auto", "bfloat16", "float16", "float32"]
    if name not in known:
        raise unknown("dtype", name, known)
    small = model == "shapes" or where == "cpu"
    return {"auto": "float32" if small else "bfloat16"}.get(name, name)


def _dtype(name: str) -> dict[str, Any]:
    """Return what `load` needs to know: nothing for float32."""
    import torch

    return {} if name == "float32" else {"dtype": getattr(torch, name)}


def device_of(name: str) -> str:
    """Return a device that can be used here. Raises ValueError for others."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(name).type
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise ValueError(f"device {name[:80]!r} cannot be used here: {reason[:160]}") from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers: take auto, cpu, cuda or mps")
    return name


def warn_of_unread_words(pipe: Any, prompts: Sequence[str]) -> None:
    """Warn of the end of prompts that no text encoder of the pipeline reads."""
    for number, prompt in enumerate(dict.fromkeys(prompts), 1):
        if lost := unread(pipe, prompt):
            warnings.warn(
                f"prompt {number} is too long for the text encoder: {lost!r} is not read", stacklevel=2
            )


def unread(pipe: Any, prompt: str) -> str:
    """Return the part of a prompt behind what the most patient tokenizer takes; empty where all is read."""
    rests = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        limit = _read_tokens(pipe, tokenizer)
        if tokenizer is None or not hasattr(tokenizer, "encode"):
            continue
        ids = tokenizer.encode(prompt, verbose=False)
        if limit is None or len(ids) <= limit:
            return ""
        rests.append(tokenizer.decode(ids[limit - 1 :], skip_special_tokens=True).strip())
    return min(rests, key=len) if rests else ""


def _read_tokens(pipe: Any, tokenizer: Any) -> int | None:
    """Return how many tokens a pipeline hands to a text encoder; None where that cannot be told."""
    import inspect

    if type(tokenizer).__name__.startswith("CLIP"):
        return int(tokenizer.model_max_length)
    longest = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    return None if longest is None or not isinstance(longest.default, int) else longest.default


def _warn_of_unknown_words(prompts: Sequence[str]) -> None:
    from diffplug.shapes import unknown_words

    for prompt in prompts:
        if words := unknown_words(prompt):
            warnings.warn(f"the Shapes model does not know {', '.join(words)} (in {prompt!r})", stacklevel=2)


def pipe_and_prompts(
    model: str, device: str, dtype: str, path: Path | None, pairs: int, seed: int
) -> tuple[Any, list[str]]:
    """The pipeline, silent, and as many prompts as pairs."""
    words = prompts_of(path, model, pairs, seed)
    pipe = load_pipeline(model, device, dtype, words if model == "shapes" else [])
    pipe.set_progress_bar_config(disable=True)
    return pipe, words


def prompts_of(path: Path | None, model: str, pairs: int, seed: int) -> list[str]:
    """As many prompts as pairs: the lines of a file again and again, or the Shapes world's own."""
    if path is None and model == "shapes":
        from diffplug.shapes import sample_prompts

        return sample_prompts(pairs, seed=seed, split="search")
    if path is None:
        raise ValueError("which prompts? Give --prompts FILE, a prompt a line: ten or more, like your own")
    from diffplug.recipe.prompt_file import read_prompts

    return list(islice(cycle([prompt.text for prompt in read_prompts(path)]), pairs))


def levels_of_model(model: str) -> Any:
    """The noise levels of a model by its name."""
    return levels_of(load_pipeline(model, "cpu", "auto", []))


def levels_of(pipe: Any) -> Any:
    """The noise levels of a pipeline's model."""
    from diffplug.samplers.solver.scheduler import SolverScheduler as solver
    from diffplug.scheduler.plug import build

    built = build(solver, pipe)
    from diffplug.samplers.model_noise import NoiseLevels

    return NoiseLevels.from_scheduler(built)
