"""A CLIP of open_clip's class with random weights, small enough to build in milliseconds, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

MODEL_CFG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PREPROCESS_CFG = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
NAME = "diffplug-tiny"


def registered() -> str:
    """The name under which open_clip knows the tiny model, for this process."""
    import tempfile

    import open_clip

    if NAME not in open_clip.list_models():
        path = Path(tempfile.mkdtemp()) / f"{NAME}.json"
        path.write_text(json.dumps(MODEL_CFG))
        open_clip.add_model_config(path)
    return NAME


def tiny_model(seed: int = 0) -> Any:
    """The model itself; weights far from their first values, so that scores differ."""
    import open_clip

    torch.manual_seed(seed)
    model = open_clip.create_model(registered())
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def write_folder(folder: Path, model: Any) -> Path:
    """The model as a folder in open_clip's own layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def pictures(n: int = 3, h: int = 40, w: int = 48, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures [n, 3, h, w] with 8-bit values."""
    coarse = torch.rand(n, 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic", align_corners=False)
    return (smooth.clamp(0, 1) * 255).round() / 255


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    """The same as PIL pictures."""
    return [Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in images]
