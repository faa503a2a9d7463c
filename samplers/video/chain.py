"""A picture first, then the video: text-to-image and image-to-video pipelines as one.

    video = ImageThenVideo(t2i, i2v, pictures=8, reward="clip")
    result = video("a red fox in snow", seed=0)
    result.image, result.frames

Drawing the picture first (arXiv 2502.07701) puts selection where it is cheap: a picture costs a few percent
of a clip, so eight of them can be judged before one clip is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffplug import rewards
from diffplug.checks import check_whole
from diffplug.intercept import original_class
from diffplug.pictures import raw_pictures, score_pictures, to_tensor
from diffplug.plug import plug
from diffplug.recipe import Recipe
from diffplug.registry import sampler
from diffplug.samplers.video.chain_size import picture_size, trimmed
from diffplug.samplers.video.clip_length import clip_frames_of
from diffplug.samplers.video.drift import DriftReport
from diffplug.samplers.video.hand_over import hand_over
from diffplug.samplers.video.long_video import LongVideo
from diffplug.seeds import picture_seeds
from diffplug.video.statistics import clip_statistics

__all__ = ["ChainResult", "ImageThenVideo"]

_KEEP = ("both", "one")


@dataclass(frozen=True)
class ChainResult:
    """A video and the picture that it grew from.

    image: [3, h, w] float32 in [0, 1]. frames: [f, 3, h, w]. rewards: of every picture drawn, empty where
    none was rated. seed: of the picture that was taken. report: of the video.
    """

    image: Tensor
    frames: Tensor
    rewards: tuple[float, ...]
    seed: int
    report: DriftReport


class ImageThenVideo:
    """Chains a text-to-image pipeline and an image-to-video pipeline, or a `LongVideo` over one.

    picture: how pictures are made, a `Recipe` or its text ("sampler=dpm++@karras,steps=8"); by default the
    pipeline's own way. sampler, video: the video's sampler by name ("wan21-i2v-lightx2v-4"), and arguments of
    its call. pictures: how many are drawn; the best by `reward` become clips. clips: how many of the best do;
    of several, the clip that `reward` likes best is returned. keep: "both" pipelines stay where they are;
    "one" moves the one that is not at work to the CPU.

    Raises ValueError at once for options that would do nothing, and for pipelines that cannot be chained.
    """

    def __init__(
        self,
        t2i: Any,
        i2v: Any,
        *,
        picture: Recipe | str | None = None,
        sampler: str | None = None,
        video: Mapping[str, Any] | None = None,
        pictures: int = 1,
        clips: int = 1,
        reward: Any = None,
        keep: str = "both",
    ) -> None:
        check_whole("pictures", pictures)
        check_whole("clips", clips)
        if keep not in _KEEP:
            raise ValueError(f"keep={keep!r}: take 'both' or 'one'")
        if clips > pictures:
            raise ValueError(f"clips={clips} of pictures={pictures}: there are not as many pictures")
        if (pictures > 1) != (reward is not None):
            raise ValueError(
                "give reward= to choose among several pictures"
                if reward is None
                else "reward= chooses among pictures: give pictures=2 or more"
            )
        self.t2i, self.long = t2i, i2v if isinstance(i2v, LongVideo) else None
        self.i2v = i2v.pipe if isinstance(i2v, LongVideo) else i2v
        self.adapter = hand_over(self.i2v) if self.long is None else self.long.adapter
        if trouble := self.adapter.trouble(1):
            raise ValueError(f"a picture cannot begin this video: {trouble}")
        self.recipe = Recipe.parse(picture) if isinstance(picture, str) else picture
        self.sampler, self.video = sampler, dict(video or {})
        self.pictures, self.clips, self.keep = pictures, clips, keep
        self.reward = rewards.get(reward) if isinstance(reward, str) else reward

    def __call__(
        self, prompt: str, *, motion_prompt: str | None = None, seed: int = 0, **video: Any
    ) -> ChainResult:
        """Return the video, its picture and the report.

        prompt: of the picture, and of the video unless `motion_prompt` says what happens. seed: of the first
        picture, and of the clip that grows from it; picture i has seed + i. Everything else goes to the video
        pipeline's call; its height and width are the picture's too.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"prompt={prompt!r}: a chain makes one video, from one text")
        call, size = picture_size(self.t2i, self.i2v, {**self.video, **video})
        seeds = picture_seeds(seed, self.pictures)
        drawn, found = self._drawn(prompt, seeds, size)
        best = sorted(range(len(seeds)), key=lambda i: -found[i])[: self.clips] if found else [0]
        self._take_turns(self.i2v, self.t2i)
        told = prompt if motion_prompt is None else motion_prompt
        made = [self._clip(drawn[i], told, seeds[i], call) for i in best]
        kept = self._best_clip([frames for frames, _ in made], prompt)
        chosen = best[kept]
        return ChainResult(drawn[chosen], made[kept][0], tuple(found), seeds[chosen], made[kept][1])

    def picture(self, prompt: str, *, seed: int = 0, **video: Any) -> Tensor:
        """Return the picture [3, h, w] that the video of the same call would begin with."""
        _, size = picture_size(self.t2i, self.i2v, {**self.video, **video})
        drawn, found = self._drawn(prompt, picture_seeds(seed, self.pictures), size)
        return drawn[max(range(len(found)), key=found.__getitem__) if found else 0]

    def _drawn(
        self, prompt: str, seeds: Sequence[int], size: tuple[int, int] | None
    ) -> tuple[Tensor, list[float]]:
        """Return pictures [n, 3, h, w] from these seeds, and what they are worth; empty where nobody asks."""
        self._take_turns(self.t2i, self.i2v)
        drawn = torch.stack([self._picture(prompt, one, size) for one in seeds])
        return drawn, self._rated(drawn, prompt)

    def _picture(self, prompt: str, seed: int, size: tuple[int, int] | None) -> Tensor:
        """Return one picture [3, h, w], generated at the video's aspect and never stretched."""
        recipe = self.recipe
        call: dict[str, Any] = (
            {"prompt": prompt} if recipe is None else recipe.call_arguments(self.t2i, [prompt])
        )
        call["output_type"] = "pt"
        if size is not None:
            call |= _told_size(self.t2i, size)
        if recipe is None:
            call["generator"] = torch.Generator().manual_seed(seed)
            plugs: Any = nullcontext()
        else:
            plugs = plug(self.t2i, *recipe.plugs(self.t2i, [seed]))
        with plugs:
            picture = to_tensor(raw_pictures(self.t2i(**call)))[0]
        return picture if size is None else trimmed(picture, size)

    def _rated(self, drawn: Tensor, prompt: str) -> list[float]:
        if self.reward is None:
            return []
        scores = rewards.score(self.reward, drawn, [prompt] * len(drawn))
        return torch.nan_to_num(scores, nan=-torch.inf).tolist()

    def _clip(
        self, picture: Tensor, prompt: str, seed: int, call: Mapping[str, Any]
    ) -> tuple[Tensor, DriftReport]:
        plugs = (
            [] if self.sampler is None else [sampler(self.sampler, self.i2v, call.get("num_inference_steps"))]
        )
        with plug(self.i2v, *plugs):
            if self.long is not None:
                told = {"video" if self.adapter.name == "video" else "image": picture[None]}
                result = self.long(_prompted(self.i2v, prompt), seed=seed, **told, **call)
                return result.frames, result.report
            arguments = {**call, "generator": torch.Generator().manual_seed(seed)}
            text = _prompted(self.i2v, prompt)
            arguments |= {} if text is None else {"prompt": text}
            frames = clip_frames_of(self.i2v, arguments.pop("num_frames", None))
            clip = self.adapter.clip(picture[None], frames, arguments)
            return clip, DriftReport(clips=(clip_statistics(clip),))

    def _best_clip(self, clips: Sequence[Tensor], prompt: str) -> int:
        if len(clips) == 1:
            return 0
        takes = bool(getattr(self.reward, "takes_video", False))
        ask = partial(rewards.score, self.reward)
        scores = [float(score_pictures(ask, c[None], [prompt], takes_video=takes)[0]) for c in clips]
        return max(range(len(scores)), key=scores.__getitem__)

    def _take_turns(self, at_work: Any, waiting: Any) -> None:
        """Move the pipeline that waits to the CPU, and the other to where it was.

        Pipelines that offload by themselves are left alone, and so is everything on a machine without an
        accelerator.
        """
        if self.keep == "both" or not torch.accelerator.is_available():
            return
        device = torch.accelerator.current_accelerator()
        if not _offloads(waiting):
            waiting.to("cpu")
            torch.accelerator.empty_cache() if hasattr(torch.accelerator, "empty_cache") else None
        if not _offloads(at_work):
            at_work.to(device)


def _offloads(pipe: Any) -> bool:
    return bool(getattr(pipe, "_all_hooks", None)) or getattr(pipe, "hf_device_map", None) is not None


def _prompted(pipe: Any, prompt: str) -> str | None:
    """Return the prompt of a pipeline that takes one; None for Stable Video Diffusion."""
    return prompt if "prompt" in inspect.signature(original_class(pipe).__call__).parameters else None


def _told_size(pipe: Any, size: tuple[int, int]) -> dict[str, int]:
    """Return height and width for a text-to-image call: the video's, up to the picture model's multiple."""
    from diffplug.samplers.video.chain_size import multiple_of

    step = multiple_of(pipe)
    height, width = (-(-side // step) * step for side in size)
    return {"height": height, "width": width}
