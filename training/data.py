"""What is trained on: prompts alone, or a folder of pictures with captions, encoded once.

Prompts: a text file with one a line, or "shapes:train" for the embedded world. Pictures: a folder with
`metadata.jsonl` ({"file_name": ..., "text": ...} a line, as in Hugging Face datasets), or with a `.txt`
beside each picture. Their latents and conditions are cached in a folder that is named by a hash of everything
they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.messages import reason
from diffplug.pictures import coloured
from diffplug.samplers.fingerprint import conditioning_fingerprint
from diffplug.training.conditions import Conditions, encode

__all__ = ["DataSettings", "Pictures", "prompts_of"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where prompts and pictures come from.

    prompts: a text file, or "shapes:train" / "shapes:search" for `count` prompts of the Shapes world.
    pictures: a folder, None to train without. size: pictures are scaled and cut to size x size pixels. drop:
    share of prompts that become empty where guidance is kept.
    """

    prompts: str = "shapes:train"
    count: int = 6000
    seed: int = 0
    pictures: str | None = None
    size: int | None = None
    drop: float = 0.1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be a whole number of at least 1, got {self.count}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be at least 0 and below 1, got {self.drop}")

    def with_empty(self, prompts: Sequence[str], kept: bool) -> list[str]:
        """Return the prompts; where guidance is kept, a share of `drop` of them is empty."""
        if not kept or not self.drop:
            return list(prompts)
        every = max(2, round(1 / self.drop))
        return ["" if i % every == every - 1 else prompt for i, prompt in enumerate(prompts)]


def prompts_of(data: DataSettings, pipe: Any = None) -> list[str]:
    """Return the training prompts; ValueError for an empty file, an empty prompt, or one that is too long."""
    world, _, split = data.prompts.partition(":")
    if world == "shapes" and split:
        from diffplug.shapes import sample_prompts

        return sample_prompts(data.count, seed=data.seed, split=split)
    file = Path(data.prompts)
    if not file.is_file():
        raise ValueError(
            f"data.prompts: there is no file {data.prompts!r}: one prompt a line, or 'shapes:train'"
        )
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"data.prompts: {data.prompts!r} is no UTF-8 text ({error})") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"data.prompts: {data.prompts!r} holds no prompt: write one a line")
    _check_lengths(prompts, pipe, data.prompts)
    return prompts


def _check_lengths(prompts: Sequence[str], pipe: Any, name: str) -> None:
    """Raise ValueError for a prompt that the tokenizer would cut off."""
    tokenizer = getattr(pipe, "tokenizer", None)
    most = getattr(tokenizer, "model_max_length", None)
    if tokenizer is None or most is None or most > 10_000:
        return
    for number, prompt in enumerate(prompts, 1):
        length = len(tokenizer(prompt).input_ids)
        if length > most:
            raise ValueError(
                f"data.prompts: line {number} of {name!r} has {length} tokens, the model reads {most}: "
                f"shorten {prompt[:40]!r}..."
            )


@dataclass(frozen=True)
class Pictures:
    """Latents [n, ...] of pictures, scaled as the denoiser knows them, their conditions and captions."""

    latents: Tensor
    conditions: Conditions
    captions: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def of(
        cls, pipe: Any, data: DataSettings, cache: Path, call: Mapping[str, Any] | None = None
    ) -> Pictures:
        """Return a folder's pictures, from `cache` where they were encoded before; float32 on the CPU."""
        from safetensors.torch import load_file, save_file

        pairs = captioned_files(Path(str(data.pictures)))
        size = data.size or int(call.get("height", 0) if call else 0) or size_of(pipe)
        file = output_folder(cache) / f"{_key(pipe, pairs, size, call)}.safetensors"
        captions = [caption for _, caption in pairs]
        if not file.exists():
            latents = torch.cat([_encoded(pipe, path, size) for path, _ in pairs])
            _, conditions = encode(pipe, captions, call=call)
            tensors = {"latents": latents, **{f"condition/{n}": v for n, v in conditions.leaves.items()}}
            with atomic_path(file) as temporary:
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        found = load_file(file)
        leaves = {n.removeprefix("condition/"): v for n, v in found.items() if n.startswith("condition/")}
        return cls(found["latents"], Conditions(leaves), captions)


def captioned_files(folder: Path) -> list[tuple[Path, str]]:
    """Return the pictures of a folder with their captions; ValueError where there are none."""
    if not folder.is_dir():
        raise ValueError(f"data.pictures: there is no folder {str(folder)!r}")
    if (folder / "metadata.jsonl").exists():
        return _listed(folder)
    found = [(p, p.with_suffix(".txt")) for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not found or not all(text.exists() for _, text in found):
        raise ValueError(
            f"data.pictures: {str(folder)!r} needs a metadata.jsonl, or a .txt with the caption beside "
            f"each picture"
        )
    return [(picture, text.read_text("utf-8").strip()) for picture, text in found]


def _listed(folder: Path) -> list[tuple[Path, str]]:
    table = folder / "metadata.jsonl"
    try:
        lines = table.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.pictures: {str(table)!r} is no UTF-8 text: save it as such") from error
    entries = [_entry(folder, line, i) for i, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise ValueError(
            f"data.pictures: {str(table)!r} lists no pictures: write a line for each, or remove it and put a "
            ".txt beside each picture"
        )
    return entries


def _entry(folder: Path, line: str, number: int) -> tuple[Path, str]:
    from diffplug.files import safe_join

    try:
        values = json.loads(line)
        picture, text = safe_join(folder, *Path(values["file_name"]).parts), values["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"data.pictures: line {number} of metadata.jsonl needs file_name and text ({error})"
        ) from error
    if not isinstance(text, str) or not picture.is_file():
        wrong = f"the text {text!r}" if not isinstance(text, str) else f"no picture {values['file_name']!r}"
        raise ValueError(
            f"data.pictures: line {number} of metadata.jsonl has {wrong}: give a file of {str(folder)!r} and "
            "its caption"
        )
    return picture, text.strip()


def size_of(pipe: Any) -> int:
    from diffplug.training.conditions import one_denoiser

    sample = getattr(one_denoiser(pipe).config, "sample_size", None)
    if not isinstance(sample, int):
        raise ValueError("data.size: say how large the pictures are to be, in pixels")
    return sample * int(getattr(pipe, "vae_scale_factor", 8))


@torch.no_grad()
def _encoded(pipe: Any, path: Path, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(coloured(image), (size, size))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {reason(error)}") from error
    x = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = pipe.vae
    z = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((z - shift) * vae.config.scaling_factor).float().cpu()


def _key(
    pipe: Any, pairs: Sequence[tuple[Path, str]], size: int, call: Mapping[str, Any] | None = None
) -> str:
    digest = hashlib.sha256(f"{conditioning_fingerprint(pipe)} {size}".encode())
    if call:
        digest.update(json.dumps(call, sort_keys=True, default=str).encode() + b"\0")
    for path, caption in pairs:
        digest.update(hashlib.sha256(path.read_bytes()).digest() + caption.encode() + b"\0")
    return digest.hexdigest()[:24]
