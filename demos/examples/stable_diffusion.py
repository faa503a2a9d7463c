"""Stable Diffusion 1.5 and its kin: a searched few-step solver, and steering by a reward.

python demos/examples/stable_diffusion.py "a lighthouse in a storm" picture.png
"""

from __future__ import annotations

import sys
from typing import Any

from diffplug import load, plug
from diffplug.samplers import Solver
from diffplug.seeds import Seeds
from diffplug.steering import FeynmanKac

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def make(pipe: Any, prompt: str, *, steps: int = 20, particles: int = 4, **size: int) -> Any:
    """Return one picture; the pipeline is afterwards what it was."""
    with plug(pipe, Solver(), Seeds(0), FeynmanKac("jpeg", particles=particles)):
        return pipe(prompt, num_inference_steps=steps, guidance_scale=7.5, **size).images[0]


if __name__ == "__main__":
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(MODEL, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    make(loaded, sys.argv[1]).save(sys.argv[2])
