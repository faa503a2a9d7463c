"""A recipe: how to make pictures (sampler, steps, guidance, steering), as one value for any pipeline."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from time import perf_counter
from typing import Any

from diffplug import rewards
from diffplug.call_arguments import asked
from diffplug.checks import is_finite
from diffplug.intercept import interceptors, original_class
from diffplug.messages import shown
from diffplug.network.denoiser import NetworkCount, count_network
from diffplug.plug import plug
from diffplug.recipe.batches import Batch, batches, guided
from diffplug.recipe.text import read_settings
from diffplug.registry import STEERERS, sampler, sampler_names, sampler_steps
from diffplug.seeds import Seeds

__all__ = ["Pictures", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one way to make pictures; `None` leaves a choice to the pipeline.

    `sampler`, `steer` and `reward` are short names (`diffplug names` lists them). `particles`, `reward`,
    `strength` and `options` (further keywords of the steerer) act only with `steer`. `width` and `height` are
    in pixels; `call` has further arguments of the pipeline's call, such as true_cfg_scale. Raises ValueError
    at once for anything out of range, and for what would do nothing.
    """

    label: str = ""
    sampler: str | None = None
    steps: int = 20
    guidance: float | None = None
    negative_prompt: str | None = None
    eta: float | None = None
    steer: str | None = None
    particles: int = 8
    reward: str = "shapes"
    strength: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    width: int | None = None
    height: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sampler", "negative_prompt", "steer", "reward"):
            if not isinstance(value := getattr(self, name), (str, type(None))):
                raise ValueError(f"{name} must be a text, got {shown(value)}")
        for name in ("options", "call"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise ValueError(f"{name} must be names with values, got {shown(value)}")
        _whole("steps", self.steps, 1, 1000)
        _whole("particles", self.particles, 1, 4096)
        _finite("guidance", self.guidance, 1000)
        _finite("eta", self.eta, 1)
        _finite("strength", self.strength)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None:
                _whole(name, side, 8, 16_384)
        self._refuse_idle()
        if taken := sorted(_OURS & self.call.keys()):
            raise ValueError(f"call={{{taken[0]!r}: ...}}: the recipe itself says {_OURS_AS[taken[0]]}")
        if self.sampler is not None and self.sampler not in sampler_names():
            sampler(self.sampler, None)  # raises, with the nearest names
            self._take_told_steps(sampler_steps(self.sampler))
        if self.steer is not None:
            self._built(_unasked, [0])  # raises for options out of range
        if self.steer is not None and self.reward not in rewards.names():
            rewards.get(self.reward)

    def _take_told_steps(self, told: int | None) -> None:
        """Takes the steps that the sampler's name says ("hyper-sd@4"); ValueError for others beside them."""
        if told is not None and self.steps not in (told, Recipe.steps):
            raise ValueError(
                f"sampler {self.sampler!r} says {told} steps, steps={self.steps}: give one of the two"
            )
        object.__setattr__(self, "steps", self.steps if told is None else told)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Return the recipe written as "sampler=ddim,steps=20,steer=fk,options='churn=1.0'".

        A value with a comma in it stands in quotes. Raises ValueError for a bad pair.
        """
        values = read_settings(text, _KINDS)
        if "steer" not in values and (idle := sorted(_STEERING & values.keys())):
            raise ValueError(f"recipe {text!r}: {idle[0]} acts only with steer=..., as steer=fk")
        return cls(**{"label": text, **values})

    def _refuse_idle(self) -> None:
        """Raise ValueError for settings of steering in a recipe that does not steer."""
        for known in fields(self) if self.steer is None else ():
            value = getattr(self, known.name)
            if known.name in _STEERING and value and value != known.default:
                raise ValueError(
                    f"{known.name} {value} acts only with a steerer: add steer='fk', or leave it out"
                )

    @property
    def copies(self) -> int:
        """How many particles run for one picture."""
        return self.particles if self.steer else 1

    def settings(self) -> dict[str, Any]:
        """The settings that acted, ready for JSON."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, "", {})}
        return {key: value for key, value in values.items() if self.steer or key not in _STEERING}

    def check(self, pipe: Any) -> None:
        """Raise ValueError for what this pipeline does not take, or what would do nothing in it."""
        if {"num_frames", "video_length"} & inspect.signature(pipe.__call__).parameters.keys():
            raise ValueError(
                f"{type(pipe).__name__} makes videos: recipes are for single pictures (diffplug video is for "
                "videos)"
            )
        call = self.call_arguments(pipe, [""])
        factor = getattr(pipe, "vae_scale_factor", 1)
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and side % factor:
                raise ValueError(f"{name} {side} is no multiple of {factor}: take {side - side % factor}")
        with plug(pipe, *self._sampler(pipe)):
            scheduler, config = original_class(pipe.scheduler), pipe.scheduler.config
            for layer in interceptors(pipe):
                if hasattr(layer, "check_call"):  # of few-step checkpoints
                    layer.check_call(call)
        if scheduler.__name__ == "PNDMScheduler" and self.steps < 4 and not config.get("skip_prk_steps"):
            raise ValueError(f"PNDM needs 4 steps or more, got {self.steps}")
        if self.eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(
                f"eta {self.eta:g} does nothing with {scheduler.__name__}: take DDIM or TCD, or leave it out"
            )
        if self.negative_prompt and not _negative_acts(pipe, call):
            raise ValueError(
                "the negative prompt acts only with guidance above 1: raise it, or leave the prompt out"
            )

    def plugs(self, pipe: Any, seeds: Sequence[int]) -> list[Any]:
        """The plugs for a call of `pipe` with these seeds of its pictures: sampler, seeds, steerer last."""
        found = [*self._sampler(pipe), Seeds(list(seeds))]
        return found if self.steer is None else [*found, self.steerer(seeds)]

    def _sampler(self, pipe: Any) -> list[Any]:
        """The plug of the sampler; none for the pipeline's own."""
        return [] if self.sampler is None else [sampler(self.sampler, pipe, self.steps)]

    def steerer(self, seeds: Sequence[int]) -> Any:
        """A fresh steerer; one that chooses at random chooses by the pictures' seeds, batch or no batch.

        Raises ValueError for a recipe that does not steer, and for options that its steerer does not know.
        """
        if self.steer is None:
            raise ValueError(f"this recipe does not steer: give steer=..., one of {STEERERS.names()}")
        return self._built(rewards.get(self.reward), seeds)

    def _built(self, reward: Any, seeds: Sequence[int]) -> Any:
        """The steerer with its options, by some reward."""
        steerer = STEERERS.get(str(self.steer))
        options = dict(self.options)
        if self.strength is not None:
            options["strength"] = self.strength
        if "seed" in inspect.signature(steerer).parameters:
            options.setdefault("seed", list(seeds))
        options = getattr(steerer, "current_options", dict)(options)
        _accepted(steerer, options, f"steerer {self.steer!r}")
        return steerer(reward, particles=self.particles, **options)

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        max_rows: int = 64,
        on_batch: Callable[[Batch], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Pictures:
        """Return one picture per prompt, each from its own seed; the pipeline is afterwards what it was.

        `max_rows` bounds pictures times particles in a call, and is halved when memory runs out;
        `on_batch(batch)` is told every batch when it is done, `on_step(done, of)` every step. Raises
        ValueError where the pipeline does not take what the recipe asks for, and for latents that are not
        finite. To have each picture as soon as it is there, use `diffplug.making`.
        """
        start, made = perf_counter(), []
        with count_network(pipe) as count:
            for batch in batches(self, pipe, prompts, seeds, max_rows=max_rows, on_step=on_step):
                made.append(batch)
                if on_batch is not None:
                    on_batch(batch)
            pairs = guided(pipe, self.guidance)
        images = [image for batch in made for image in batch.images]
        reached = [reward for batch in made for reward in batch.rewards]
        reports = [batch.report for batch in made if batch.report is not None]
        return Pictures(images, count, perf_counter() - start, pairs, reports, reached)

    def call_arguments(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call. Raises ValueError for those that it does not take."""
        call: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": self.steps, **self.call}
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        if self.negative_prompt is not None:
            call["negative_prompt"] = [self.negative_prompt] * len(prompts)
        for name in ("eta", "width", "height"):
            if getattr(self, name) is not None:
                call[name] = getattr(self, name)
        _accepted(pipe.__call__, call, type(pipe).__name__)
        return call


@dataclass(frozen=True)
class Pictures:
    """What a recipe made: PIL `images`, the `network` count, wall-clock `seconds`, the steering `reports`.

    `images` follow the prompts; a steerer that returns every particle gives them picture by picture.
    `rewards` says what each picture reached, None where nothing was scored.
    """

    images: list[Any]
    network: NetworkCount
    seconds: float
    guided: bool
    reports: list[Any]
    rewards: list[float | None] = field(default_factory=list)

    @property
    def evaluations(self) -> float:
        """Network evaluations in all; the two rows of a guided prediction count as one."""
        return self.network.rows / (2 if self.guided else 1)


_STEERING = {"particles", "reward", "strength", "options"}
"""Settings that act only with a steerer."""

_KINDS: dict[str, type] = {
    "label": str,
    "sampler": str,
    "steps": int,
    "guidance": float,
    "negative_prompt": str,
    "eta": float,
    "steer": str,
    "particles": int,
    "reward": str,
    "strength": float,
    "options": dict,
    "width": int,
    "height": int,
    "call": dict,
}

_OURS_AS = {
    "prompt": "the prompts",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative_prompt",
    "eta": "eta",
    "width": "width",
    "height": "height",
    "generator": "the seeds",
    "latents": "the seeds",
    "output_type": "that pictures are wanted",
    "return_dict": "how pictures come back",
    "num_images_per_prompt": "how many pictures are wanted, by its seeds",
    "callback_on_step_end": "who is told of steps",
}
_OURS = _OURS_AS.keys()


def _unasked(images: Any, prompts: Any) -> Any:
    """The reward of a steerer that is built to be looked at only."""
    raise AssertionError("a steerer that only checks its options was run")


def _whole(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")


def _finite(name: str, value: float | None, most: float = math.inf) -> None:
    if value is None:
        return
    if not (is_finite(value) and 0 <= value <= most):
        above = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name} must be a finite number of at least 0{above}, got {shown(value)}")


def _negative_acts(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Return whether a call runs unconditional rows, as far as the pipeline's defaults tell."""
    names = inspect.signature(pipe.__call__).parameters
    scale = asked(pipe, call, "true_cfg_scale" if "true_cfg_scale" in names else "guidance_scale")
    return not isinstance(scale, (int, float)) or scale > 1


def _accepted(callee: Any, call: Mapping[str, Any], name: str) -> None:
    """Raise ValueError for arguments that `callee` does not name; `**kwargs` would swallow them."""
    known = [key for key, p in inspect.signature(callee).parameters.items() if p.kind is not p.VAR_KEYWORD]
    if strange := [key for key in call if key not in known]:
        near = get_close_matches(strange[0], known, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{name} takes no {' or '.join(strange)}: leave it out{meant}")
