"""The loop over clips: which clip begins where, with which seed, and which frames it adds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from diffplug.samplers.video.drift import DriftReport
from diffplug.samplers.video.float_pictures import pil_picture
from diffplug.samplers.video.hand_over import HandOver
from diffplug.samplers.video.seams import joined_frames, match_clip, measured_join
from diffplug.video.statistics import clip_statistics

__all__ = ["ClipLoop", "LoopState", "clip_seed"]


def clip_seed(seed: int, clip: int, candidate: int = 0) -> int:
    """Return the seed of a clip's candidate: the video's own for the first, a far away one for all others.

    It depends on nothing that happened before: not on how many candidates earlier clips had, nor on retries.
    """
    if clip == candidate == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/clip {clip}/{candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


@dataclass(frozen=True)
class LoopState:
    """What a long video is continued from.

    clip: number of the next clip. emitted: frames that are out. tail: the last p frames of the clip before,
    [p, 3, h, w]. first: the first frame of all. selection: what the selector goes on with. report: what
    happened so far. carried: what else the clip before left, tensors by name.
    """

    clip: int = 0
    emitted: int = 0
    tail: Tensor | None = None
    first: Tensor | None = None
    selection: Mapping[str, Any] | None = None
    report: DriftReport = field(default_factory=DriftReport)
    carried: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClipLoop:
    """One long video in the making; see `LongVideo` for what the settings mean.

    anchored: a block in which a clip is made, given what the clip before left.
    """

    adapter: HandOver
    length: int
    clip_frames: int
    overlap: int
    seam: str
    match: str | None
    match_strength: float
    reference: bool
    anchored: Callable[[dict[str, Tensor]], AbstractContextManager[None]]
    select: Any
    prompts: Mapping[int, str]
    seed: int
    call: Mapping[str, Any]

    def run(self, state: LoopState) -> Iterator[tuple[Tensor, LoopState]]:
        """Yield the frames that each clip adds [n, 3, h, w], and the state after it, until all are out."""
        if self.select is not None:
            self.select.begin(state.selection)
            if state.report.clips:
                self.select.compare_with(state.report.clips[0])
        while state.emitted < self.length:
            began = perf_counter()
            clip, carried, rewards = self._drawn(state)
            if state.tail is not None and self.match is not None:
                first = state.report.clips[0]
                clip = match_clip(clip, state.tail, first, self.match, self.match_strength)
            frames, state = self._joined(clip, carried, state)
            if self.select is not None:
                state = replace(state, selection=self.select.state())
                self.select.compare_with(state.report.clips[0])
            state = replace(state, report=_timed(state.report, perf_counter() - began, rewards, self.select))
            yield frames, state

    def _drawn(self, state: LoopState) -> tuple[Tensor, dict[str, Tensor], list[float]]:
        """Return the next clip, what it leaves, and the rewards of its candidates where it was selected."""
        if self.select is None:
            return *self._candidate(state, 0), []
        drawn = [self._candidate(state, j) for j in range(self.select.candidates)]
        clips = [clip for clip, _ in drawn]
        kept, rewards = self.select.choose(clips, self._prompt(state) or "", clip_seed(self.seed, state.clip))
        return *drawn[kept], rewards

    def _candidate(self, state: LoopState, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        call = dict(self.call)
        seed = clip_seed(self.seed, state.clip, number)
        call["generator"] = torch.Generator().manual_seed(seed)
        if (prompt := self._prompt(state)) is not None:
            call["prompt"] = prompt
        if state.tail is not None:
            for name in ("image", "video", "conditions", "mask"):
                call.pop(name, None)
        if self.reference and state.first is not None:
            call["reference_images"] = pil_picture(state.first)
        clip, carried = self._made(state, call)
        if len(clip) != self.clip_frames:
            raise ValueError(
                f"a clip has {len(clip)} frames, {self.clip_frames} were asked for: give clip_frames= a "
                "number that this model makes"
            )
        if state.tail is not None and clip.shape[1:] != state.tail.shape[1:]:
            raise ValueError(
                f"clip {state.clip} has frames of {tuple(clip.shape[2:])} pixels, the prefix "
                f"{tuple(state.tail.shape[2:])}: give the call height and width"
            )
        return clip, carried

    def _made(self, state: LoopState, call: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clip of a call and what it leaves; the adapter itself remembers nothing."""
        carried = dict(state.carried)
        with _carrying(self.adapter, carried), self.anchored(carried):
            return self.adapter.clip(state.tail, self.clip_frames, call), carried

    def _prompt(self, state: LoopState) -> str | None:
        """Return the prompt of the next clip: the one that holds at its first new frame."""
        new = state.clip * (self.clip_frames - self.overlap) + (self.overlap if state.clip else 0)
        return next((text for frame, text in reversed([*self.prompts.items()]) if frame <= new), None)

    def _joined(self, clip: Tensor, carried: dict[str, Tensor], state: LoopState) -> tuple[Tensor, LoopState]:
        """Return the frames that a clip adds, and the state after it.

        With seam="keep" the last p frames are out at once, for no later clip changes them.
        """
        p, begins = self.overlap, state.clip * (self.clip_frames - self.overlap)
        body, joins = clip, state.report.joins
        if state.tail is not None:
            joins = (*joins, measured_join(begins + p, state.tail, clip))
            body = torch.cat([joined_frames(self.seam, state.tail, clip[:p]), clip[p:]])
        last = begins + self.clip_frames >= self.length
        until = len(body) if last or self.seam == "keep" else len(body) - p
        frames = body[state.emitted - begins : min(until, self.length - begins)]
        report = replace(state.report, clips=(*state.report.clips, clip_statistics(clip)), joins=joins)
        first = clip[0] if state.first is None else state.first
        return frames, LoopState(
            clip=state.clip + 1,
            emitted=state.emitted + len(frames),
            tail=clip[-p:].clone(),
            first=first.clone(),
            carried=carried,
            report=report,
        )


@contextmanager
def _carrying(adapter: Any, carried: dict[str, Tensor]) -> Iterator[None]:
    """A block in which a hand-over that passes on more than frames has what the clip before left."""
    carries = hasattr(adapter, "carried")
    if carries:
        adapter.carried = carried
    try:
        yield
    finally:
        if carries:
            adapter.carried = {}


def _timed(report: DriftReport, seconds: float, rewards: list[float], select: Any) -> DriftReport:
    more = (*report.rewards, tuple(rewards)) if rewards else report.rewards
    weight = getattr(select, "log_weight", None)
    return replace(report, seconds=(*report.seconds, seconds), rewards=more, log_weight=weight)
