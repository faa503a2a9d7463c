"""What commands have in common: the pipeline on its device, and prompts."""

from __future__ import annotations

import warnings
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import diffplug
from diffplug.cli.console import hush
from diffplug.registry import unknown


def load_pipeline(model: str, device: str, dtype: str, prompts: list[str]) -> Any:
    """The pipeline on its device; warns of words that the Shapes model has never seen."""
    hush()
    where = _device(device)
    pipe = diffplug.load(model, **_dtype(dtype, small=model == "shapes" or where == "cpu"))
    if model == "shapes":
        _warn_of_unknown_words(prompts)
    return pipe.to(where)


def _dtype(name: str, *, small: bool) -> dict[str, Any]:
    """What `load` needs to know: nothing for float32; auto is bfloat16 where the model is not small."""
    import torch

    known = ["auto", "bfloat16", "float16", "float32"]
    if name not in known:
        raise unknown("dtype", name, known)
    name = {"auto": "float32" if small else "bfloat16"}.get(name, name)
    return {} if name == "float32" else {"dtype": getattr(torch, name)}


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def _warn_of_unknown_words(prompts: list[str]) -> None:
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
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{str(path)!r} holds no prompt: write one a line")
    return list(islice(cycle(lines), pairs))


def levels_of_model(model: str) -> Any:
    """The noise levels of a model by its name."""
    return levels_of(load_pipeline(model, "cpu", "auto", []))


def levels_of(pipe: Any) -> Any:
    """The noise levels of a pipeline's model."""
    from diffplug.samplers.solver.scheduler import SolverScheduler as solver
    from diffplug.scheduler_plug import build

    built = build(solver, pipe)
    from diffplug.samplers.model_noise import NoiseLevels

    return NoiseLevels.from_scheduler(built)
