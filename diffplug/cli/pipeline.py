"""What commands have in common: the pipeline on its device, and prompts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from diffplug.placing import Memory, hush, placed


def load_pipeline(
    model: str, device: str, dtype: str, prompts: Sequence[str], memory: Memory | None = None
) -> Any:
    """Return the pipeline on its device; warn of words that are not known to it, or not read."""
    hush()
    pipe = placed(model, device, dtype, memory)
    if model == "shapes":
        _warn_of_unknown_words(prompts)
    warn_of_unread_words(pipe, prompts)
    return pipe


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
