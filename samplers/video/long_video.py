"""Long videos, clip by clip: each is generated given the last frames of the one before.

    long = LongVideo(pipe, frames=241, overlap=5)
    result = long("a boat drifts down a river", seed=0)
    result.frames, result.report

Memory does not grow with the length where frames are taken one by one (`long.frames(...)`) or written as they
come (`long.write(folder, ...)`, which also resumes). Within a clip and at every join the model is exact; what
it saw two clips ago it has forgotten. `report` says what that did to colours and motion.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffplug.checks import check_whole
from diffplug.intercept import original_class
from diffplug.plug import plugs_on
from diffplug.registry import unknown
from diffplug.samplers.video.anchor import ANCHORS, EMBEDDINGS, embeds_pictures, first_embeddings
from diffplug.samplers.video.clip_length import clip_frames_of
from diffplug.samplers.video.clip_loop import ClipLoop, LoopState
from diffplug.samplers.video.drift import DriftReport
from diffplug.samplers.video.hand_over import HandOver
from diffplug.samplers.video.hand_over import hand_over as fitting_hand_over
from diffplug.samplers.video.latent_hand_over import LATENTS
from diffplug.samplers.video.seams import MATCHES, SEAMS
from diffplug.seeds import picture_seeds

__all__ = ["LongVideo", "LongVideoResult", "Selector"]


class Selector(Protocol):
    """Chooses one of several candidates for a clip, such as `diffplug.steering.ClipSelection`."""

    candidates: int

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Forget an earlier video, or go on from what `state` returned."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Return what a video is continued with, ready for JSON."""
        ...

    def compare_with(self, first: Any) -> None:
        """Take note of the first clip's statistics."""
        ...

    def choose(self, clips: list[Tensor], prompt: str, seed: int) -> tuple[int, list[float]]:
        """Return the number of the clip that is kept, and every candidate's reward."""
        ...


@dataclass(frozen=True)
class LongVideoResult:
    """A long video: `frames` [f, 3, h, w] float32 in [0, 1], and what it did over its clips."""

    frames: Tensor
    report: DriftReport


class LongVideo:
    """Continues a pipeline's clips to any length.

    pipe: an image-to-video pipeline, or one that takes first frames. frames: of the whole video. overlap: the
    frames that a clip is given of the one before, a number that the model was trained with (1 for pictures);
    default the most that it takes of 1 and 5. clip_frames: of one clip, default the pipeline's own.
    seam: where clips meet, show "keep" the earlier clip's frames, "new" the later's, or "fade" between them.
    match: bring colours of later clips to those of the first ("anchor") or of the frames handed over
    ("prefix"); off by default, since it also undoes real changes. anchor: "embeds" shows every clip the
    picture embedding of the first (Wan 2.1, SkyReels V2, HunyuanVideo 1.5, SVD), "frame" its first frame as a
    reference (VACE).
    select: draws `select.candidates` clips at every join and keeps one. hand_over: another adapter than the
    one that fits the pipeline.

    Raises ValueError, before any work, for lengths that the model does not make, prefixes
    that it was not trained with, and pipelines that loop by themselves or take no first frames.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        frames: int,
        overlap: int | None = None,
        clip_frames: int | None = None,
        seam: str = "keep",
        match: str | None = None,
        match_strength: float = 1.0,
        anchor: str | None = None,
        select: Selector | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        check_whole("frames", frames)
        for name, value, known in (
            ("seam", seam, SEAMS),
            ("match", match, MATCHES),
            ("anchor", anchor, ANCHORS),
        ):
            if value is not None and value not in known:
                raise unknown(name, value, list(known))
        if not 0 < match_strength <= 1:
            raise ValueError(f"match_strength={match_strength!r}: it must be above 0 and at most 1")
        if match is None and match_strength != 1.0:
            raise ValueError("match_strength acts only with match='anchor' or match='prefix'")
        self.pipe, self.length, self.seam = pipe, frames, seam
        self.match, self.match_strength, self.anchor, self.select = match, match_strength, anchor, select
        self.adapter: HandOver = fitting_hand_over(pipe) if hand_over is None else hand_over
        self.clip_frames = clip_frames_of(pipe, clip_frames)
        self.overlap = _overlap(self.adapter, overlap)
        self._check()

    def _check(self) -> None:
        if self.overlap >= self.clip_frames:
            raise ValueError(
                f"overlap={self.overlap} leaves a clip of {self.clip_frames} frames nothing new: take less"
            )
        if self.match is not None and self.adapter.name == "latents" and self.overlap > 1:
            raise ValueError(
                f"match={self.match!r} moves the colours of pixels, and the next clip goes on from latents, "
                "which keep theirs: leave it out, or take overlap=1"
            )
        if self.anchor == "frame" and self.adapter.name != "vace":
            raise ValueError("anchor='frame' is for pipelines that take reference pictures (WanVACEPipeline)")
        if self.anchor == "embeds" and not embeds_pictures(self.pipe):
            raise ValueError(
                f"anchor='embeds': {type(self.pipe).__name__} embeds no picture; it is for Wan 2.1, SkyReels "
                "V2 and HunyuanVideo 1.5 I2V, and for SVD"
            )
        kind = getattr(getattr(self.pipe, "vae", None), "dtype", torch.float32)
        if kind != torch.float32 and self.adapter.name != "latents":
            warnings.warn(
                f"the autoencoder is {kind}, and every join goes through it: colours run away more slowly "
                "after pipe.vae.to(torch.float32)",
                stacklevel=3,
            )

    @property
    def clips(self) -> int:
        """How many clips the video takes."""
        more = max(0, self.length - self.clip_frames)
        return 1 + -(-more // (self.clip_frames - self.overlap))

    def __call__(self, prompt: str | None = None, **arguments: Any) -> LongVideoResult:
        """Return the whole video and its report; arguments as for `frames`."""
        report: list[DriftReport] = []
        frames = [*self._frames(prompt, report, arguments)]
        return LongVideoResult(torch.stack(frames), report[-1])

    def frames(self, prompt: str | None = None, **arguments: Any) -> Iterator[Tensor]:
        """Yield the frames [3, h, w] one by one, each as soon as nothing can change it any more.

        prompt: of the whole video. prompts: instead of it, from which frame on which prompt holds, as
        {0: "a forest", 96: "a lake"}; a clip has the prompt of its first new frame. seed: of clip 0; later
        clips get seeds made of it and their number alone. image, video: what the first clip begins with.
        Everything else goes to the pipeline's call. The first frames of a longer video are bit for bit those
        of a shorter one.
        Raises ValueError before the first clip where arguments do not fit.
        """
        return self._frames(prompt, [], arguments)

    def write(self, folder: str | Path, prompt: str | None = None, **arguments: Any) -> DriftReport:
        """Write the frames into a folder as PNG files while they come, and return the report.

        Killed at any moment and called again, it goes on after the last whole clip, to the same bits. Raises
        ValueError for a folder that holds another request, with what differs, and WriteError where the disk
        refuses.
        """
        from diffplug.samplers.video.video_folder import VideoFolder

        loop, state = self._loop(prompt, arguments), LoopState()
        place = VideoFolder.of(Path(folder), self._request(prompt, arguments))
        state = place.resumed(state)
        self._check_resumed(folder, state)
        for frames, after in loop.run(state):
            place.add(frames, after)
            state = after
        place.finish(state.report)
        return state.report

    def _frames(
        self, prompt: str | None, reports: list[DriftReport], arguments: Mapping[str, Any]
    ) -> Iterator[Tensor]:
        loop = self._loop(prompt, arguments)

        def made() -> Iterator[Tensor]:
            for frames, after in loop.run(LoopState()):
                reports.append(after.report)
                yield from frames

        return made()

    def _loop(self, prompt: str | None, arguments: Mapping[str, Any]) -> ClipLoop:
        """Return the loop of a call. Raises ValueError where its arguments do not fit."""
        call = dict(arguments)
        seed, prompts = call.pop("seed", 0), call.pop("prompts", None)
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r}: a long video has one seed, a whole number")
        picture_seeds(seed)
        for name in ("generator", "latents", "num_frames", "frames", "output_type", "return_dict"):
            if name in call:
                raise ValueError(f"{name}= is decided by LongVideo, clip by clip: leave it out")
        self._check_known(call)
        self._check_first(call)
        return ClipLoop(
            adapter=self.adapter,
            length=self.length,
            clip_frames=self.clip_frames,
            overlap=self.overlap,
            seam=self.seam,
            match=self.match,
            match_strength=self.match_strength,
            reference=self.anchor == "frame",
            anchored=self._anchored,
            select=self.select,
            prompts=_prompts(prompt, prompts, self.length),
            seed=seed,
            call=call,
        )

    def _check_known(self, call: Mapping[str, Any]) -> None:
        """Raise ValueError for an argument that the pipeline's call does not take."""
        if self.pipe is None or plugs_on(self.pipe):  # plugs may take arguments of their own
            return
        known = inspect.signature(original_class(self.pipe).__call__).parameters
        if any(one.kind is one.VAR_KEYWORD for one in known.values()):
            return
        for name in call:
            if name not in known:
                raise ValueError(f"{original_class(self.pipe).__name__} takes no {name}: leave it out")

    def _check_first(self, call: Mapping[str, Any]) -> None:
        """Raise ValueError where the first clip of a picture-to-video model has no picture."""
        takes = getattr(self.adapter, "begins_with", ())
        if takes and all(call.get(name) is None for name in takes):
            raise ValueError(
                f"{type(self.pipe).__name__} needs a picture to begin with: give "
                f"{' or '.join(f'{name}=' for name in takes)}, or draw one first with ImageThenVideo"
            )

    def _anchored(self, carried: dict[str, Tensor]) -> AbstractContextManager[None]:
        return first_embeddings(self.pipe, carried) if self.anchor == "embeds" else nullcontext()

    def _check_resumed(self, folder: str | Path, state: LoopState) -> None:
        """Raise ValueError for a begun video whose folder does not hold what the next clip needs."""
        needed = [EMBEDDINGS] if self.anchor == "embeds" else []
        needed += [LATENTS] if self.adapter.name == "latents" and self.overlap > 1 else []
        lost = [name for name in needed if name not in state.carried]
        if state.clip and state.emitted < self.length and lost:
            raise ValueError(
                f"{str(folder)!r} was begun by a version that kept no {lost[0]}, so it cannot be resumed: "
                "take another folder"
            )

    def _request(self, prompt: str | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a folder is asked for; two equal ones are the same video."""
        from diffplug.samplers.video.request import described, sampled_by, weights_of

        settings = {
            name: getattr(self, name)
            for name in ("clip_frames", "overlap", "seam", "match", "match_strength", "anchor")
        }
        select = None if self.select is None else described(self.select)
        model = type(self.pipe).__name__
        told = {key: described(value) for key, value in arguments.items()}
        how = {"select": select, "model": model, "weights": weights_of(self.pipe)}
        how["sampler"] = sampled_by(self.pipe)
        return {"frames": self.length, **settings, **how, "prompt": prompt, **told}


def _overlap(adapter: HandOver, given: int | None) -> int:
    if given is None:
        fit = [p for p in (5, 4, 1) if not adapter.trouble(p)]
        return fit[0] if fit else 1
    check_whole("overlap", given)
    if trouble := adapter.trouble(given):
        raise ValueError(f"overlap={given}: {trouble}")
    return given


def _prompts(prompt: str | None, prompts: Mapping[int, str] | None, length: int) -> dict[int, str]:
    """Return from which frame on which prompt holds; empty for models without prompts."""
    if prompts is None:
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(
                f"prompt={prompt!r}: a long video has one text; give prompts= by frame for several"
            )
        return {} if prompt is None else {0: prompt}
    if prompt is not None:
        raise ValueError("prompt and prompts were both given: leave one out")
    if not isinstance(prompts, Mapping) or not prompts or 0 not in prompts:
        raise ValueError(f"prompts={prompts!r}: give texts by their first frame, beginning with 0")
    for frame, text in prompts.items():
        if isinstance(frame, bool) or not isinstance(frame, int) or not 0 <= frame < length:
            raise ValueError(f"prompts: {frame!r} is no frame of a video of {length}")
        if not isinstance(text, str):
            raise ValueError(f"prompts: frame {frame} has {text!r}, it must be a text")
    return dict(sorted(prompts.items()))
