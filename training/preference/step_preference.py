"""A step-aware preference model: CLIP whose picture tower is told the timestep (arXiv 2406.04314).

    S(x, t, prompt) = exp(logit_scale) cos(f_V(x, t), f_T(prompt))

Each layer of the picture tower has six numbers a channel from the timestep (adaLN): shift, scale and gate of
its attention, and of its MLP. At their identity the model is the CLIP that it was built on, at every
timestep. The layout is that of the published checkpoints (prefix `model.`), which `load` reads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffplug.files import atomic_path, output_folder
from diffplug.messages import reason

__all__ = ["StepJudge", "StepPreference", "resized", "time_embedding", "weighted_by_prompt"]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WAVES = 256


def time_embedding(timestep: Tensor, width: int = WAVES) -> Tensor:
    """Return [cos | sin] of timesteps [n] at width / 2 frequencies from 1 down to 1 / 10,000."""
    half = width // 2
    rate = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angle = timestep.float()[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def resized(images: Tensor, size: int) -> Tensor:
    """Return pictures [n, 3, h, w] in [0, 1] as CLIP sees them: bicubic, cut to a square, standardised."""
    h, w = images.shape[-2:]
    short = min(h, w)
    shape = [int(side * size / short + 0.5) for side in (h, w)]
    x = F.interpolate(images, shape, mode="bicubic", align_corners=False)
    top, left = ((n - size) // 2 for n in shape)
    x = x[..., top : top + size, left : left + size].clamp(0, 1)
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


class _TimeMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timestep: Tensor) -> Tensor:
        found: Tensor = self.mlp(time_embedding(timestep).to(next(self.parameters()).dtype))
        return found


class StepPreference(nn.Module):
    """A CLIP of transformers with timesteps. clip: a `CLIPModel`; tokenizer: texts to input_ids.

    Built on a CLIP, it gives that CLIP's scores at every timestep until it is trained.
    """

    def __init__(self, clip: Any, tokenizer: Any = None) -> None:
        super().__init__()
        self.model, self.tokenizer = clip, tokenizer
        width = clip.config.vision_config.hidden_size
        vision = clip.vision_model
        clip.t_embedder = _TimeMLP(width)
        for layer in vision.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        vision.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self._identity(width)

    @torch.no_grad()
    def _identity(self, width: int) -> None:
        for part in self.model.t_embedder.mlp:
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        vision = self.model.vision_model
        for module in (vision, *vision.encoder.layers):
            last = module.adaLN_modulation[1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        for layer in vision.encoder.layers:  # shift, scale, gate of attention; the same of the MLP
            for gate in (2, 5):
                layer.adaLN_modulation[1].bias[gate * width : (gate + 1) * width] = 1.0

    @classmethod
    def open(cls, folder: str | Path) -> StepPreference:
        """Return the model of a folder: a CLIP's config.json and tokenizer, and one file of weights.

        The weights are a .safetensors, or a published .bin. Raises ValueError where one of them is missing.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        place = Path(folder)
        files = sorted([*place.glob("*.safetensors"), *place.glob("*.bin")])
        words = any((place / name).exists() for name in ("tokenizer.json", "vocab.json"))
        if not (place / "config.json").exists() or not words or len(files) != 1:
            raise ValueError(
                f"{str(folder)!r} is no folder of a step-aware preference model: it needs config.json and "
                "tokenizer of the CLIP that it was built on, and one file of weights, there are "
                f"{len(files)}"
            )
        try:
            config, tokenizer = CLIPConfig.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{str(folder)!r} has no config or tokenizer of a CLIP beside the weights ({reason(error)})"
            ) from error
        model = cls(CLIPModel(config), tokenizer)
        model.load(files[0])
        return model

    def save(self, folder: str | Path) -> None:
        """Write a folder that `open` reads."""
        from safetensors.torch import save_file

        place = output_folder(folder)
        self.model.config.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        with atomic_path(place / "step_preference.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)

    def load(self, path: str | Path) -> None:
        """Take the weights of a published checkpoint.

        Raises ValueError for a damaged file, and where a key is missing or has no place.
        """
        from diffplug.samplers.few_step.weights_file import read_weights

        state, _ = read_weights(path)
        own = self.state_dict()
        idle = {name for name in state if name.endswith("embeddings.position_ids")}
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - idle)
        odd = missing or extra or [n for n in own if state[n].shape != own[n].shape]
        if odd:
            raise ValueError(
                f"{str(path)!r} is no step-aware preference model of this size: {odd[0]!r} "
                f"{'is missing' if missing else 'does not fit'} ({len(odd)} in all)"
            )
        self.load_state_dict({name: value for name, value in state.items() if name not in idle})

    def pictures(self, pixels: Tensor, timestep: Tensor) -> Tensor:
        """Return unit vectors [n, d] of standardised pictures [n, 3, s, s] at timesteps [n]."""
        vision = self.model.vision_model
        told = self.model.t_embedder(timestep)
        h = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            h = _layer(layer, h, told)
        shift, scale = (v[:, 0] for v in _modulation(vision, told, 2))
        pooled = vision.post_layernorm(h[:, 0]) * (1 + scale) + shift
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors [n, d] of prompts."""
        inputs = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        device = self.model.logit_scale.device
        hidden = self.model.text_model(**{name: value.to(device) for name, value in inputs.items()})
        return F.normalize(self.model.text_projection(hidden.pooler_output), dim=-1)

    def forward(self, images: Tensor, timestep: Tensor, texts: Tensor) -> Tensor:
        """Return scores [n] of pictures [n, 3, h, w] in [0, 1] at timesteps [n]; texts: of `texts`."""
        size = self.model.config.vision_config.image_size
        seen = self.pictures(resized(images, size), timestep)
        scores: Tensor = self.model.logit_scale.exp() * (seen * texts).sum(1)
        return scores


def _modulation(module: Any, told: Tensor, parts: int) -> tuple[Tensor, ...]:
    return module.adaLN_modulation(told)[:, None].chunk(parts, dim=-1)


def _layer(layer: Any, h: Tensor, told: Tensor) -> Tensor:
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = _modulation(layer, told, 6)
    attended = layer.self_attn(layer.layer_norm1(h) * (1 + scale_a) + shift_a)
    h = h + gate_a * (attended[0] if isinstance(attended, tuple) else attended)
    out: Tensor = h + gate_m * layer.mlp(layer.layer_norm2(h) * (1 + scale_m) + shift_m)
    return out


def weighted_by_prompt(prompts: Sequence[str]) -> Tensor:
    """Return weights [n] that sum to one, each prompt's pairs together as much as any other's."""
    counts = Counter(prompts)
    weight = torch.tensor([1 / counts[prompt] for prompt in prompts])
    return weight / weight.sum()


class StepJudge:
    """A step scorer from a step-aware preference model: decodes x0hat, and asks at the timestep."""

    def __init__(self, model: StepPreference, images: Any) -> None:
        self.model, self.images = model.eval(), images
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, x0: Tensor, prompts: Sequence[str], timestep: float) -> Tensor:
        """Return scores [n] float64 of clean predictions [n, ...]."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._known:
                self._known[prompt] = self.model.texts([prompt])[0]
        texts = torch.stack([self._known[prompt] for prompt in prompts])
        images = self.images(x0).to(texts.device)
        t = torch.full((len(x0),), timestep, device=texts.device)
        return self.model(images, t, texts).double().cpu()
