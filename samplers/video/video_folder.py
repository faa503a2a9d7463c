"""A long video on disk: its frames as PNG files, and what it is continued from after a kill.

request.json            what was asked for
frames/000000.png ...   the frames, numbered from 0
state.json              clips done, frames out, the report; written last
tail-N.safetensors      what clip N is given: frames as floats, latents, embeddings of an anchor
report.json             once the video is whole
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffplug.files import atomic_path, atomic_write, output_folder, read_json, sweep_temporaries, write_json
from diffplug.messages import reason
from diffplug.samplers.video.clip_loop import LoopState
from diffplug.samplers.video.drift import DriftReport
from diffplug.samplers.video.request import described

__all__ = ["VideoFolder"]


@dataclass(frozen=True)
class VideoFolder:
    """A folder that a long video is written into."""

    path: Path

    @classmethod
    def of(cls, path: Path, request: Mapping[str, Any]) -> VideoFolder:
        """Return the folder of a request, made if it is not there.

        Raises ValueError where it holds another request, with what differs.
        """
        output_folder(path)
        asked, file = _plain(request), path / "request.json"
        if file.exists() and _begun(path):
            there = read_json(file)
            found = [
                f"{key}: {there.get(key)!r} there, {asked.get(key)!r} here"
                for key in sorted({*there, *asked})
                if there.get(key) != asked.get(key)
            ]
            if found:
                raise ValueError(
                    f"{str(path)!r} holds another video ({'; '.join(found[:3])}): take another folder, or "
                    "ask for the same"
                )
        elif not file.exists() and any(path.iterdir()):
            raise ValueError(f"{str(path)!r} is not empty and holds no video: take another folder")
        else:
            write_json(file, asked)
        output_folder(path / "frames")
        return cls(path)

    def resumed(self, fresh: LoopState) -> LoopState:
        """Return the state after the last whole clip, `fresh` where there is none."""
        sweep_temporaries(self.path / "frames")
        file = self.path / "state.json"
        if not file.exists():
            return fresh
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        state = read_json(file)
        try:
            kept = load_file(self._tail(state["clip"]))
            tail, first = kept.pop("tail"), kept.pop("first")
            report = DriftReport.from_mapping(state["report"])
            return LoopState(state["clip"], state["emitted"], tail, first, state["selection"], report, kept)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__} {reason(error)}"
            raise ValueError(f"{str(self.path)!r} is damaged ({why}): remove it and start anew") from error

    def add(self, frames: Tensor, after: LoopState) -> None:
        """Write the frames that a clip added, then the state: a kill in between repeats the clip."""
        from safetensors.torch import save_file

        for number, frame in enumerate(frames, after.emitted - len(frames)):
            atomic_write(self.frame(number), _png(frame))
        assert after.tail is not None and after.first is not None  # noqa: S101 -- there was a clip
        with atomic_path(self._tail(after.clip)) as temporary:
            kept = {**after.carried, "tail": after.tail, "first": after.first}
            save_file({name: value.cpu().contiguous() for name, value in kept.items()}, temporary)
        done = {"clip": after.clip, "emitted": after.emitted, "selection": after.selection}
        write_json(self.path / "state.json", {**done, "report": after.report.as_mapping()})
        self._tail(after.clip - 1).unlink(missing_ok=True)

    def finish(self, report: DriftReport) -> None:
        """Write the report of the whole video."""
        write_json(self.path / "report.json", report.as_mapping())

    def frame(self, number: int) -> Path:
        """Return the file of a frame."""
        return self.path / "frames" / f"{number:06d}.png"

    def _tail(self, clip: int) -> Path:
        return self.path / f"tail-{clip}.safetensors"


def _begun(path: Path) -> bool:
    """Return whether a frame was ever written: a request that failed before binds the folder to nothing."""
    return (path / "state.json").exists() or any((path / "frames").glob("*.png"))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: described(value) for key, value in values.items()}


def _png(frame: Tensor) -> bytes:
    pixels = (frame.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
