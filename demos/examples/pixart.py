"""PixArt: a diffusion transformer with a learned variance, through a solver by name.

python demos/examples/pixart.py "a lighthouse in a storm" picture.png
"""

from __future__ import annotations

import sys
from typing import Any

from diffplug import load, plug
from diffplug.samplers import Solver
from diffplug.seeds import Seeds

MODEL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"


def make(pipe: Any, prompt: str, *, steps: int = 20, **size: int) -> Any:
    """Return one picture; the pipeline is afterwards what it was."""
    with plug(pipe, Solver(), Seeds(0)):
        return pipe(prompt, num_inference_steps=steps, **size).images[0]


if __name__ == "__main__":
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(MODEL, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    make(loaded, sys.argv[1]).save(sys.argv[2])
