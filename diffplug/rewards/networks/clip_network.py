"""open_clip models as networks that score: found by name, folder or file, loaded safely, run on tensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffplug.files import read_json
from diffplug.messages import reason
from diffplug.registry import unknown
from diffplug.rewards.networks import TextFeatures
from diffplug.rewards.networks.checkpoints import load_into, read_weights
from diffplug.rewards.networks.preprocess import Preprocess

__all__ = ["ClipNetwork", "clip_network", "import_open_clip", "untrained"]

CONFIG = "open_clip_config.json"
_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
)


class ClipNetwork(nn.Module):
    """An open_clip model that gives the cosine between each picture and its prompt.

    Args:
        model: an open_clip model. tokenizer: texts to ids [n, tokens]. preprocess: pictures to its input.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.model, self.tokenizer, self.preprocess = model, tokenizer, preprocess
        self.text_features = TextFeatures(self._encode_text)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines [n] float32 of pictures [n, 3, h, w] in [0, 1] with n prompts."""
        features = self.image_features(images)
        return (features * self.text_features(prompts, features.device)).sum(-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Features [n, d] float32 of length 1."""
        inputs = self.preprocess(images).to(next(self.model.parameters()).dtype)
        return F.normalize(self.model.encode_image(inputs).float(), dim=-1)  # type: ignore[operator]

    def _encode_text(self, prompts: list[str]) -> Tensor:
        ids = self.tokenizer(prompts).to(next(self.model.parameters()).device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)  # type: ignore[operator]


def import_open_clip() -> Any:
    """The package open_clip; ModuleNotFoundError says which extra installs it."""
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'this reward needs open_clip, which is not installed: pip install "diffplug[clip]"',
            name=error.name,
        ) from error
    return open_clip


def clip_network(model: str, pretrained: str | None) -> ClipNetwork:
    """The network of an open_clip model.

    Args:
        model: a name that open_clip knows, a folder with open_clip_config.json, or "hf-hub:owner/name".
        pretrained: a tag that open_clip knows (downloaded) or a weight file; None with a folder or hub id.
    """
    open_clip = import_open_clip()
    if Path(model).is_dir():
        return _from_folder(open_clip, Path(model))
    if model.startswith("hf-hub:"):
        return _finished(open_clip, _from_hub(open_clip, model), model)
    names = open_clip.list_models()
    if model not in names:
        hint = "Or give a folder with open_clip_config.json, or hf-hub:owner/name."
        raise unknown("CLIP model", model, names, hint)
    if pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"CLIP model {model!r} needs weights: add a tag ({tags}) or a file, {model}/...")
    if Path(pretrained).is_file():
        return _from_file(open_clip, model, Path(pretrained))
    return _finished(open_clip, _from_tag(open_clip, model, pretrained), model)


def untrained(open_clip: Any, model: str) -> nn.Module:
    """An open_clip model with random weights; nothing is downloaded."""
    with _without_notices():
        # random weights are what is wanted here; open_clip would warn of them
        return open_clip.create_model(model, pretrained=None, load_weights=False, pretrained_text=False)


def fill(model: nn.Module, file: Path, what: str) -> None:
    """Load a weight file into an open_clip model; ValueError names the file and what does not fit."""
    state = read_weights(file, what)
    wanted = model.state_dict()
    for name in ("logit_scale", "logit_bias"):  # files write these single numbers as [] or [1]
        if name in state and name in wanted and state[name].numel() == 1:
            state[name] = state[name].reshape(wanted[name].shape)
    load_into(model, state, file, what)


def _quick(open_clip: Any, model: str) -> str:
    """Return the name of the same model with OpenAI's activation, where there is one."""
    twin = f"{model}-quickgelu"
    return twin if twin in open_clip.list_models() else model


def _from_file(open_clip: Any, model: str, file: Path) -> ClipNetwork:
    if (twin := _quick(open_clip, model)) != model:
        warnings.warn(
            f"a file does not say which activation its weights were trained with, and {model} has GELU: for "
            f"OpenAI's own weights say {twin}/{file}",
            stacklevel=2,
        )
    network = untrained(open_clip, model)
    fill(network, file, f"CLIP model {model}")
    return _finished(open_clip, network, model)


def _from_folder(open_clip: Any, folder: Path) -> ClipNetwork:
    what = "CLIP folder"
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{what}: {str(folder)!r} holds no {CONFIG}: give a folder that open_clip saved.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "model_cfg" not in config:
        raise ValueError(
            f"{what}: {str(folder / CONFIG)!r} has no 'model_cfg': give a folder of open_clip's."
        )
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{what}: {str(folder)!r} holds no weights, expected one of {', '.join(_FILES)}.")
    name = f"local-dir:{folder}"
    network = untrained(open_clip, name)
    fill(network, file, what)
    return _finished(open_clip, network, name)


def _from_hub(open_clip: Any, model: str) -> nn.Module:
    try:
        with _without_notices():
            return open_clip.create_model(model, require_pretrained=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"CLIP model {model!r} did not come from the hub: {reason(error)}") from error


def _from_tag(open_clip: Any, model: str, tag: str) -> nn.Module:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        raise unknown(f"weights of CLIP model {model}:", tag, tags, "Or give a weight file that exists.")
    config = open_clip.get_pretrained_cfg(model, tag)
    # the tag says which activation its weights were trained with; open_clip only warns of another
    quick = bool(config.get("quick_gelu"))
    named = _quick(open_clip, model) if quick else model
    try:
        with _without_notices():
            return open_clip.create_model(model, pretrained=tag, force_quick_gelu=quick)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"CLIP weights {model}/{tag} did not come ({reason(error)}). Run once with a "
            f"connection, or download them and give the file: {named}/PATH"
        ) from error


def _finished(open_clip: Any, model: nn.Module, name: str) -> ClipNetwork:
    visual: Any = model.visual
    preprocess = Preprocess.from_open_clip(visual.preprocess_cfg)
    return ClipNetwork(model, open_clip.get_tokenizer(name), preprocess)


@contextmanager
def _without_notices() -> Iterator[None]:
    """open_clip reports on the root logger, even what it raises as well: what is raised says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=[]):  # random first weights must not move the caller's generator
            yield
    finally:
        logging.disable(before)
