"""Pairs of pictures with a winner: a folder, a table, or the votes of people.

    pairs/pairs.jsonl      {"prompt": "...", "better": "0001.png", "worse": "0002.png"} a line
    pairs.parquet          columns prompt, better, worse: file names, or the bytes of pictures
    votes.jsonl            {"prompt": "...", "a": "x.png", "b": "y.png", "vote": "a" | "b" | "tie"} a line, or
                           image_0, image_1, label_0, label_1 as the page of `diffplug demo` writes them
    votes.parquet          caption, jpg_0, jpg_1, label_0, label_1 (Pick-a-Pic's columns)

File names are relative to the folder of the table. A tie, and a pair that two votes decide differently, has
no winner and is left out.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.files import atomic_path, output_folder, safe_join
from diffplug.training.conditions import Conditions, encode
from diffplug.training.data import _encoded, size_of

__all__ = ["Pair", "PairLatents", "read_pairs"]

Picture = Path | bytes
TABLES = ("pairs.jsonl", "pairs.parquet", "votes.jsonl", "votes.parquet")
"""What is looked for in a folder."""


@dataclass(frozen=True)
class Pair:
    """A prompt with the picture that people, or a reward, preferred, and the other one."""

    prompt: str
    better: Picture
    worse: Picture


def read_pairs(source: str | Path) -> list[Pair]:
    """Return the pairs of a folder, a .jsonl or a .parquet file.

    Raises ValueError in one line: a file that is missing, a line that is no pair, pictures that are not
    there, and where not one pair has a winner.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in TABLES if (path / name).exists()), path)
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"objective.pairs: {str(source)!r} is neither a .jsonl or .parquet file nor a folder with "
            "pairs.jsonl or pairs.parquet: give one, as --set objective.pairs=votes.parquet (diffplug votes "
            "export writes it)"
        )
    rows = list(_parquet(path) if path.suffix == ".parquet" else _lines(path))
    pairs = _without_contradictions([pair for row, where in rows if (pair := _pair(row, path, where))])
    if not pairs:
        raise ValueError(
            f"objective.pairs: none of the {len(rows)} rows of {str(source)!r} has a winner: there is "
            "nothing to prefer"
        )
    return pairs


def _lines(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"objective.pairs: {str(path)!r} is no UTF-8 text ({error}): save it as such"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"objective.pairs: {where} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"objective.pairs: {where} is no JSON object")
        yield row, where


def _parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            "objective.pairs: a parquet file needs pyarrow: pip install 'diffplug[batch]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # what pyarrow raises for damaged files
        raise ValueError(
            f"objective.pairs: {str(path)!r} is no whole parquet file ({error}): write it anew"
        ) from error
    for number, row in enumerate(rows, 1):
        yield row, f"row {number} of {path.name}"


def _pair(row: Mapping[str, Any], path: Path, where: str) -> Pair | None:
    """Return the pair of a row; None for a tie."""
    if "label_0" in row and "label_1" in row:
        row = _by_labels(row, where)
    if "vote" in row:
        if row["vote"] not in ("a", "b", "tie"):
            raise ValueError(f"objective.pairs: {where}: vote is {row['vote']!r}, expected 'a', 'b' or 'tie'")
        if row["vote"] == "tie":
            return None
        other = "b" if row["vote"] == "a" else "a"
        row = {"prompt": row.get("prompt"), "better": row.get(row["vote"]), "worse": row.get(other)}
    if not isinstance(row.get("prompt"), str) or not row.get("better") or not row.get("worse"):
        raise ValueError(
            f"objective.pairs: {where} needs prompt, better and worse (or prompt, a, b and vote)"
        )
    found = [_picture(row[name], path.parent, where) for name in ("better", "worse")]
    return None if found[0] == found[1] else Pair(row["prompt"], found[0], found[1])


def _by_labels(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a vote that labels its pictures 1, 0 or .5 as prompt, a, b and vote."""
    labels = [row["label_0"], row["label_1"]]
    if not all(isinstance(label, (int, float)) and 0 <= label <= 1 for label in labels):
        raise ValueError(f"objective.pairs: {where}: labels are {labels}, expected two numbers from 0 to 1")
    vote = "tie" if labels[0] == labels[1] else "a" if labels[0] > labels[1] else "b"
    pictures = [row.get(f"image_{i}", row.get(f"jpg_{i}")) for i in (0, 1)]
    return {"prompt": row.get("prompt", row.get("caption")), "a": pictures[0], "b": pictures[1], "vote": vote}


def _picture(value: Any, folder: Path, where: str) -> Picture:
    if isinstance(value, Mapping):  # as Hugging Face datasets store pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(
            f"objective.pairs: {where}: a picture is a file name or bytes, got {type(value).__name__}"
        )
    try:
        file = safe_join(folder, *Path(value).parts)
    except ValueError as error:
        raise ValueError(f"objective.pairs: {where}: {error}") from error
    if not file.is_file():
        raise ValueError(f"objective.pairs: {where}: there is no picture {value!r} beside the table")
    return file


def _without_contradictions(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave out pairs that are there both ways round."""
    both = {(p.prompt, p.worse, p.better) for p in pairs}
    return [p for p in pairs if (p.prompt, p.better, p.worse) not in both]


@dataclass(frozen=True)
class PairLatents:
    """latents: [n, 2, ...] float32 on the CPU, the better first; conditions of their n prompts."""

    latents: Tensor
    conditions: Conditions
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    @classmethod
    def of(
        cls,
        pipe: Any,
        pairs: Sequence[Pair],
        cache: Path,
        *,
        size: int | None = None,
        call: Mapping[str, Any] | None = None,
    ) -> PairLatents:
        """Return the pairs encoded, from `cache` where that was done before."""
        from safetensors.torch import load_file, save_file

        size = size or int(call.get("height", 0) if call else 0) or size_of(pipe)
        file = output_folder(cache) / f"pairs-{_key(pipe, pairs, size, call)}.safetensors"
        prompts = [pair.prompt for pair in pairs]
        if not file.exists():
            latents = torch.stack(
                [
                    torch.cat([_latent(pipe, p, size, pair) for p in (pair.better, pair.worse)])
                    for pair in pairs
                ]
            )
            _, conditions = encode(pipe, prompts, call=call)
            tensors = {"latents": latents, **{f"condition/{n}": v for n, v in conditions.leaves.items()}}
            with atomic_path(file) as temporary:
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        found = load_file(file)
        leaves = {n.removeprefix("condition/"): v for n, v in found.items() if n.startswith("condition/")}
        return cls(found["latents"], Conditions(leaves), prompts)


def _latent(pipe: Any, picture: Picture, size: int, pair: Pair) -> Tensor:
    place: Any = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        return _encoded(pipe, place, size)
    except ValueError as error:
        side = "better" if picture is pair.better else "worse"
        raise ValueError(
            f"objective.pairs: the {side} picture of {pair.prompt[:60]!r} is damaged, replace it or take the "
            f"pair out: {error}"
        ) from error


def _key(pipe: Any, pairs: Sequence[Pair], size: int, call: Mapping[str, Any] | None) -> str:
    from diffplug.samplers.fingerprint import conditioning_fingerprint

    digest = hashlib.sha256(f"{conditioning_fingerprint(pipe)} {size}".encode())
    if call:
        digest.update(json.dumps(call, sort_keys=True, default=str).encode() + b"\0")
    for pair in pairs:
        for picture in (pair.better, pair.worse):
            data = picture if isinstance(picture, bytes) else picture.read_bytes()
            digest.update(hashlib.sha256(data).digest())
        digest.update(pair.prompt.encode() + b"\0")
    return digest.hexdigest()[:24]
