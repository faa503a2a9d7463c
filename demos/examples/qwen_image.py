"""Qwen-Image: true guidance beside the distilled one, steered.

python demos/examples/qwen_image.py "a lighthouse in a storm" picture.png
"""

from __future__ import annotations

import sys
from typing import Any

from diffplug import load, plug
from diffplug.seeds import Seeds
from diffplug.steering import FeynmanKac

MODEL = "Qwen/Qwen-Image"


def make(pipe: Any, prompt: str, *, steps: int = 20, particles: int = 4, **size: int) -> Any:
    """Return one picture; the pipeline is afterwards what it was."""
    with plug(pipe, Seeds(0), FeynmanKac("jpeg", particles=particles)):
        return pipe(
            prompt, num_inference_steps=steps, true_cfg_scale=4.0, negative_prompt=" ", **size
        ).images[0]


if __name__ == "__main__":
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load(MODEL, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    make(loaded, sys.argv[1]).save(sys.argv[2])
