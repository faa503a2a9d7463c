"""A folder of pictures as latents and text embeddings, encoded once and kept in a cache.

Captions are a `.txt` beside each picture, or a `metadata.jsonl`; pictures without one take a caption for all.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import atomic_path, output_folder
from diffplug.messages import reason
from diffplug.pictures import coloured
from diffplug.samplers.fingerprint import conditioning_fingerprint
from diffplug.training.conditions import Conditions, encode, one_denoiser
from diffplug.training.data import SUFFIXES, captioned_files
from diffplug.training.finetune.buckets import Size, best_size, bucket_sizes

__all__ = ["Bucket", "bucketed", "captions_of", "pixel_step", "read_buckets"]


@dataclass(frozen=True)
class Bucket:
    """Pictures of one size: latents [n, ...] as the denoiser knows them, conditions, captions; on the CPU."""

    size: Size
    latents: Tensor
    conditions: Conditions
    captions: list[str]

    def __len__(self) -> int:
        return len(self.latents)


def captions_of(folder: Path, caption: str = "", trigger: str = "") -> list[tuple[Path, str]]:
    """Return a folder's pictures with their captions.

    caption: of pictures without a text of their own. trigger: words before every caption. Raises ValueError
    for a folder without pictures, and for pictures without any caption.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give one with pictures and a .txt beside each")
    if (folder / "metadata.jsonl").exists():
        pairs = [(picture, _given(picture, text, caption)) for picture, text in captioned_files(folder)]
    else:
        found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]
        if not found:
            raise ValueError(
                f"{str(folder)!r} holds no pictures ({', '.join(SUFFIXES)}): give another folder"
            )
        pairs = [(picture, _caption(picture, caption)) for picture in found]
    return [(picture, f"{trigger}{text}") for picture, text in pairs]


def _caption(picture: Path, caption: str) -> str:
    text = picture.with_suffix(".txt")
    try:
        own = text.read_text("utf-8-sig").strip() if text.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(text)!r} is no UTF-8 text: save it as such") from error
    return _given(picture, own, caption)


def _given(picture: Path, own: str, caption: str) -> str:
    """Return a picture's own caption, or that of all; ValueError where there is neither."""
    if not own and not caption:
        raise ValueError(
            f"{picture.name!r} has no caption: write one into {picture.with_suffix('.txt').name!r} (or "
            "metadata.jsonl, where there is one), or give one for all by objective.caption"
        )
    return own or caption


def pixel_step(pipe: Any) -> int:
    """Return what sides of pictures must be multiples of: the autoencoder's factor times the denoiser's."""
    denoiser = one_denoiser(pipe)
    blocks = getattr(denoiser.config, "block_out_channels", None)
    inner = 2 ** (len(blocks) - 1) if blocks else int(getattr(denoiser.config, "patch_size", None) or 2)
    return int(getattr(pipe, "vae_scale_factor", 8)) * inner


def bucketed(
    pairs: Sequence[tuple[Path, str]], size: int, step: int, *, square: bool
) -> dict[Size, list[tuple[Path, str]]]:
    """Return pictures by the size that they are scaled and cut to."""
    from PIL import Image, ImageOps

    sizes = [(size, size)] if square else bucket_sizes(size, step)
    bucket_sizes(size, step)  # a size that the model cannot take is refused in either case
    groups: dict[Size, list[tuple[Path, str]]] = {}
    for picture, text in pairs:
        try:
            with Image.open(picture) as image:
                width, height = ImageOps.exif_transpose(image).size
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{str(picture)!r} cannot be read as a picture: {reason(error)}") from error
        groups.setdefault(best_size(width, height, sizes), []).append((picture, text))
    return dict(sorted(groups.items()))


def read_buckets(
    pipe: Any,
    groups: Mapping[Size, Sequence[tuple[Path, str]]],
    cache: Path,
    call: Mapping[str, Any],
    on_part: Callable[[int], None] = lambda n: None,
) -> list[Bucket]:
    """Return each size's pictures encoded, from `cache` where they were encoded before.

    call: further arguments of the pipeline's call; those of the size are added. on_part: told how many
    pictures more are ready.
    """
    buckets = []
    for size, pairs in groups.items():
        buckets.append(_bucket(pipe, size, pairs, cache, call))
        on_part(len(pairs))
    return buckets


def _bucket(
    pipe: Any, size: Size, pairs: Sequence[tuple[Path, str]], cache: Path, call: Mapping[str, Any]
) -> Bucket:
    from safetensors.torch import load_file, save_file

    captions = [text for _, text in pairs]
    file = output_folder(cache) / f"{_key(pipe, pairs, size, call)}.safetensors"
    if not file.exists():
        _warn_of_long(pipe, captions)
        latents = torch.cat([encoded(pipe, path, size) for path, _ in pairs])
        conditions = conditions_of(pipe, captions, size, call)
        tensors = {"latents": latents, **{f"condition/{n}": v for n, v in conditions.leaves.items()}}
        with atomic_path(file) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    found = load_file(file)
    leaves = {n.removeprefix("condition/"): v for n, v in found.items() if n.startswith("condition/")}
    return Bucket(size, found["latents"], Conditions(leaves), captions)


def conditions_of(pipe: Any, captions: Sequence[str], size: Size, call: Mapping[str, Any]) -> Conditions:
    """Return the conditions of captions for pictures of a size; equal captions are encoded once."""
    import inspect

    known = inspect.signature(pipe.__call__).parameters
    told = {**call, **{n: v for n, v in (("width", size[0]), ("height", size[1])) if n in known}}
    unique = list(dict.fromkeys(captions))
    places = {text: i for i, text in enumerate(unique)}
    return encode(pipe, unique, call=told)[1][torch.tensor([places[text] for text in captions])]


@torch.no_grad()
def encoded(pipe: Any, path: Path, size: Size) -> Tensor:
    """Return a picture's latents [1, ...], float32 on the CPU: scaled to cover `size`, cut at the centre."""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        fitted = ImageOps.fit(coloured(image), size)
    x = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    vae = pipe.vae
    z = vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((z - shift) * vae.config.scaling_factor).float().cpu()


def _warn_of_long(pipe: Any, captions: Sequence[str]) -> None:
    tokenizer = getattr(pipe, "tokenizer", None)
    most = getattr(tokenizer, "model_max_length", None)
    if tokenizer is None or most is None or most > 10_000:
        return
    long = [text for text in captions if len(tokenizer(text).input_ids) > most]
    if long:
        warnings.warn(
            f"{len(long)} captions have more than the {most} tokens that the model reads, as {long[0][:40]!r}"
            "...: their ends are lost",
            stacklevel=5,
        )


def _key(pipe: Any, pairs: Sequence[tuple[Path, str]], size: Size, call: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(f"{conditioning_fingerprint(pipe)} {size} {sorted(call.items())}".encode())
    for path, caption in pairs:
        digest.update(hashlib.sha256(path.read_bytes()).digest() + caption.encode() + b"\0")
    return digest.hexdigest()[:24]
