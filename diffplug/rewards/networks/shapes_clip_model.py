"""A small CLIP for the Shapes world in open_clip's own format: class, configuration, tokenizer, files.

`open_clip.create_model("local-dir:FOLDER")` loads what `save_clip` writes; so does the reward `shapes-clip`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from diffplug.files import atomic_path, output_folder, write_json
from diffplug.rewards.networks.clip_network import import_open_clip
from diffplug.shapes.model import END, START, TOKENS, tokenizer_of
from diffplug.shapes.world import IMAGE_SIZE

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows every word of the grammar; the end mark has the highest number of all.

    CLIP reads a text's features at the highest number in it, so the order is not that of the pipeline's.
    """
    return tokenizer_of(lambda pieces: [*pieces, START, END])


def clip_config(
    words: CLIPTokenizer,
    *,
    width: int = 128,
    vision_width: int = 16,
    vision_layers: tuple[int, int, int, int] = (1, 1, 1, 1),
    text_layers: int = 2,
) -> dict[str, Any]:
    """open_clip's configuration of the model; the defaults make 1.9 million parameters.

    The image tower is CLIP's residual network: on pictures this small it learns in a fraction of the time
    that a transformer takes. width: of texts and of the common space.
    """
    return {
        "model_cfg": {
            "embed_dim": width,
            "vision_cfg": {
                "image_size": IMAGE_SIZE,
                "layers": list(vision_layers),
                "width": vision_width,
                "head_width": vision_width * 4,
            },
            "text_cfg": {
                "context_length": TOKENS,
                "vocab_size": len(words),
                "hf_tokenizer_name": "shapes-clip",  # any name: with local-dir: the folder's own is taken
                "width": width,
                "heads": 4,
                "layers": text_layers,
            },
        },
        "preprocess_cfg": {
            "size": IMAGE_SIZE,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def clip_model(config: dict[str, Any]) -> nn.Module:
    """open_clip's CLIP of a configuration, untrained; needs open_clip."""
    sizes = {k: dict(v) if isinstance(v, dict) else v for k, v in config["model_cfg"].items()}
    return import_open_clip().CLIP(**sizes)


def save_clip(model: nn.Module, words: CLIPTokenizer, config: dict[str, Any], folder: Path) -> None:
    """Write model (half precision), tokenizer and configuration; the last one marks a whole folder."""
    output_folder(folder)
    state = {
        key: value.detach().to("cpu", torch.float16 if value.is_floating_point() else None).contiguous()
        for key, value in model.state_dict().items()
    }
    words.save_pretrained(folder)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_json(folder / CONFIG, config)
