"""A recipe: how to make pictures (sampler, steps, guidance, steering), as one value for any pipeline."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any

from diffplug import rewards
from diffplug.denoiser import NetworkCount, count_network
from diffplug.intercept import original_class
from diffplug.plug import plug
from diffplug.registry import STEERERS, sampler, sampler_names, unknown
from diffplug.seeds import Seeds

__all__ = ["Pictures", "Recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one way to make pictures; `None` leaves a choice to the pipeline.

    `sampler`, `steer` and `reward` are short names (`diffplug names` lists them). `particles`, `reward`,
    `strength` and `options` (further keywords of the steerer) act only with `steer`. Raises ValueError at
    once for anything out of range.
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

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1000)
        _whole("particles", self.particles, 4096)
        _finite("guidance", self.guidance)
        _finite("eta", self.eta)
        _finite("strength", self.strength)
        if self.sampler is not None and self.sampler not in sampler_names():
            sampler(self.sampler, None)  # raises, with the nearest names
        if self.steer is not None:
            self._built(_unasked, [0])  # raises for options out of range
        if self.steer is not None and self.reward not in rewards.names():
            rewards.get(self.reward)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The recipe written as "sampler=ddim,steps=20,steer=fk,particles=8"; ValueError for a bad pair."""
        values: dict[str, Any] = {}
        for pair in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (side.strip() for side in pair.partition("="))
            if key not in _READERS:
                raise unknown("setting", key, sorted(_READERS), f"In the recipe {text!r}.")
            if not equals or key in values:
                raise ValueError(f"recipe {text!r}: write {key}=value, once")
            values[key] = _read(key, value)
        return cls(**{"label": text, **values})

    @property
    def copies(self) -> int:
        """How many particles run for one picture."""
        return self.particles if self.steer else 1

    def settings(self) -> dict[str, Any]:
        """The settings that acted, ready for JSON."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, "", {})}
        idle = () if self.steer else ("particles", "reward", "strength", "options")
        return {key: value for key, value in values.items() if key not in idle}

    def settled(self, pipe: Any) -> Recipe:
        """The recipe with noise where it says none, steers by copying particles, and its solver adds none.

        Copies part in noise. A rule that knows how its copies get some (`noise_for`) is given that; under
        others DDIM has eta = 1. `run` does this itself.
        """
        if self.steer is None or self.eta is not None or "churn" in self.options:
            return self
        steerer = STEERERS.get(self.steer)
        if not getattr(steerer, "copies", False):
            return self
        with plug(pipe, *self._sampler(pipe)):
            ddim = original_class(pipe.scheduler).__name__ == "DDIMScheduler"
            noise = steerer.noise_for(pipe.scheduler, self.options) if hasattr(steerer, "noise_for") else {}
        if noise:
            return replace(self, options={**self.options, **noise})
        takes = "eta" in inspect.signature(pipe.__call__).parameters
        return replace(self, eta=1.0) if ddim and takes else self

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
        _accepted(steerer, options, f"steerer {self.steer!r}")
        return steerer(reward, particles=self.particles, **options)

    def run(
        self,
        pipe: Any,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        max_rows: int = 64,
        on_batch: Callable[[int], None] | None = None,
    ) -> Pictures:
        """One picture per prompt, each from its own seed; the pipeline is afterwards what it was before.

        `max_rows` bounds pictures times particles in a call; `on_batch(n)` is told after every n pictures.
        Raises ValueError where the pipeline does not take what the recipe asks for.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed for each prompt")
        recipe, per_call = self.settled(pipe), max(1, max_rows // self.copies)
        images: list[Any] = []
        reports: list[Any] = []
        start = perf_counter()
        with _quiet(pipe), count_network(pipe) as count:
            for first in range(0, len(prompts), per_call):
                part = slice(first, first + per_call)
                plugs = recipe.plugs(pipe, seeds[part])
                with plug(pipe, *plugs):
                    images += _images(pipe, pipe(**recipe._call(pipe, prompts[part])))
                reports += [plugs[-1].report] if self.steer else []
                if on_batch is not None:
                    on_batch(len(prompts[part]))
            guided = _guided(pipe, self.guidance)
        return Pictures(images, count, perf_counter() - start, guided, reports)

    def _call(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
        call: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": self.steps}
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        if self.negative_prompt is not None:
            call["negative_prompt"] = [self.negative_prompt] * len(prompts)
        if self.eta is not None:
            call["eta"] = self.eta
        _accepted(pipe.__call__, call, type(pipe).__name__)
        return call


@dataclass(frozen=True)
class Pictures:
    """What a recipe made: PIL `images`, the `network` count, wall-clock `seconds`, the steering `reports`.

    `images` follow the prompts; a steerer that returns every particle gives them picture by picture.
    """

    images: list[Any]
    network: NetworkCount
    seconds: float
    guided: bool
    reports: list[Any]

    @property
    def evaluations(self) -> float:
        """Network evaluations in all; the two rows of a guided prediction count as one."""
        return self.network.rows / (2 if self.guided else 1)


_READERS: dict[str, Callable[[str], Any]] = {
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
}


def _unasked(images: Any, prompts: Any) -> Any:
    """The reward of a steerer that is built to be looked at only."""
    raise AssertionError("a steerer that only checks its options was run")


def _read(key: str, value: str) -> Any:
    try:
        return _READERS[key](value)
    except ValueError as error:
        raise ValueError(f"{key} must be a number, got {value!r}") from error


def _whole(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value!r}")


def _finite(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def _accepted(callee: Any, call: Mapping[str, Any], name: str) -> None:
    """Raises ValueError for arguments that `callee` does not know."""
    known = inspect.signature(callee).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    if strange := [key for key in call if key not in known]:
        raise ValueError(f"{name} takes no {' or '.join(strange)}: leave it out")


def _images(pipe: Any, output: Any) -> list[Any]:
    """The PIL pictures of a call."""
    if not hasattr(output, "images"):
        raise ValueError(f"{type(pipe).__name__} makes no single images: recipes are for pictures")
    return list(output.images)


def _guided(pipe: Any, guidance: float | None) -> bool:
    """Whether the last call ran a conditional and an unconditional row for each picture."""
    said = getattr(pipe, "do_classifier_free_guidance", None)
    return bool(said) if said is not None else guidance is not None and guidance > 1


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar is off inside the block."""
    before = dict(getattr(pipe, "_progress_bar_config", None) or {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
