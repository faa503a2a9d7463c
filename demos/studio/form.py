"""What a user of the page asks for: checked once, and turned into a recipe, a command, a row, Python."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

from diffplug.demos.studio import limits
from diffplug.recipe import Recipe

__all__ = ["NO_STEERER", "OWN", "Choices", "Form", "restored"]

OWN = "the model's own"
NO_STEERER = "none"


@dataclass(frozen=True)
class Choices:
    """The names that a page offers; nothing else is taken. presets: settings by name.

    files: what somebody else would call the file of a sampler that was named for this page.
    """

    model: str
    samplers: Sequence[str]
    steerers: Sequence[str]
    rewards: Sequence[str]
    presets: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, files: Mapping[str, str] | None = None) -> Choices:
        """Return what this installation has that needs no download, and samplers' files by their names."""
        from diffplug.registry import STEERERS, sampler_names

        names = [name for name in sampler_names() if model == "shapes" or "shapes" not in name]
        rewards = ["shapes", "shapes-clip"] if model == "shapes" else []
        presets = _presets(model)
        extra = {str(values["sampler"]) for values in presets.values()} - {OWN, *names}
        return cls(
            model,
            [OWN, *names, *sorted(extra)],
            [NO_STEERER, *(name for name in STEERERS.names() if name != "noise-search")],
            [*rewards, "jpeg", "colour", "sharpness"],
            presets,
            {name: PurePath(path).name for name, path in (files or {}).items()},
        )


def _presets(model: str) -> dict[str, dict[str, Any]]:
    """Return settings that belong together, by the name under which people know them."""
    from diffplug.demos.compare import demo_recipes

    plain: dict[str, Any] = {"sampler": OWN, "steps": 20, "guidance": 7.5, "steer": NO_STEERER}
    found: dict[str, dict[str, Any]] = {
        "Stock, 20 steps": dict(plain),
        "Stock, 50 steps": {**plain, "steps": 50},
    }
    if model != "shapes":
        return {**found, "DC-Solver, 10 steps": {**plain, "sampler": "dc-solver", "steps": 10}}
    for recipe in demo_recipes():
        found[recipe.label] = {
            "sampler": recipe.sampler or OWN,
            "steps": recipe.steps,
            "guidance": 5.0 if recipe.guidance is None else recipe.guidance,
            "steer": recipe.steer or NO_STEERER,
            "particles": recipe.particles,
            "reward": recipe.reward,
            "strength": recipe.strength or 0.0,
        }
    return {name: {**values, "guidance": min(values["guidance"], 5.0)} for name, values in found.items()}


@dataclass(frozen=True)
class Form:
    """Checked settings of a request; `strength` 0 leaves it to the steerer."""

    prompt: str
    negative_prompt: str = ""
    sampler: str = OWN
    steps: int = 20
    guidance: float = 5.0
    seed: int = 0
    pictures: int = 1
    steer: str = NO_STEERER
    reward: str = "shapes"
    particles: int = 4
    strength: float = 0.0
    all_particles: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any], choices: Choices) -> Form:
        """Return the form of values that came from outside. Raises ValueError of one line."""
        known = {field.name for field in fields(cls)}
        if strange := sorted(str(key)[:80] for key in values.keys() - known):
            raise ValueError(f"{strange[0]!r} is no setting of the page")
        found: dict[str, Any] = {"prompt": limits.text("prompt", values.get("prompt"))}
        found["negative_prompt"] = limits.text("negative prompt", values.get("negative_prompt"), empty=True)
        offered = {"sampler": choices.samplers, "steer": choices.steerers, "reward": choices.rewards}
        for name, names in offered.items():
            if name in values:
                found[name] = limits.choice(name, values[name], names)
        found.setdefault("reward", choices.rewards[0])
        for name in limits.LIMITS:
            if name in values:
                found[name] = limits.number(name, values[name])
        if not isinstance(values.get("all_particles", False), bool):
            raise ValueError("all_particles must be true or false")
        found["all_particles"] = values.get("all_particles", False)
        form = cls(**found)
        form._within_budget()
        form.recipe()
        return form

    def _within_budget(self) -> None:
        copies = self.particles if self.steered else 1
        cost = self.steps * copies * self.pictures
        if cost > limits.BUDGET:
            raise ValueError(
                f"{self.steps} steps x {copies} particles x {self.pictures} pictures are {cost:,} "
                f"evaluations, and {limits.BUDGET:,} are allowed: lower one of them"
            )
        if self.seed + self.pictures - 1 > limits.LIMITS["seed"].high:
            raise ValueError("the seeds of the last pictures are too large: lower the seed")

    @property
    def steered(self) -> bool:
        """Return whether particles are chosen among."""
        return self.steer != NO_STEERER

    def recipe(self) -> Recipe:
        """Return how to make it. Raises ValueError for settings that do not go together."""
        steering: dict[str, Any] = {}
        if self.steered:
            steering = {"steer": self.steer, "reward": self.reward, "particles": self.particles}
            steering["strength"] = self.strength or None
            steering["options"] = {"returns": "all"} if self.all_particles else {}
        return Recipe(
            sampler=None if self.sampler == OWN else self.sampler,
            steps=self.steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt or None,
            **steering,
        )

    def singles(self) -> list[Form]:
        """Return a form for every picture, with its own seed."""
        return [replace(self, seed=self.seed + i, pictures=1) for i in range(self.pictures)]

    def _said(self) -> dict[str, Any]:
        """Return the settings of the recipe that somebody would write down."""
        settings = self.recipe().settings()
        if self.steered and settings.get("strength") is None:
            settings.pop("strength", None)
        return settings

    def command(self, model: str, files: Mapping[str, str] | None = None) -> str:
        """Return the command line that makes the same pictures. files: of samplers that have been named."""
        words = ["diffplug", "generate", self.prompt, "--model", model, "--seed", str(self.seed)]
        for name, value in self._said().items():
            if name == "options":
                for key, one in value.items():
                    words += [f"--{key}", str(one)]
            else:
                words += [
                    f"--{name.replace('_', '-')}",
                    f"{value:g}" if isinstance(value, float) else str(value),
                ]
        if self.pictures > 1:
            words += ["-n", str(self.pictures)]
        if self.sampler in (files or {}):
            words += ["--samplers", f"{self.sampler}={(files or {})[self.sampler]}"]
        return shlex.join(words)

    def row(self) -> str:
        """Return the row of a manifest for `diffplug batch` that asks for the same pictures."""
        images = {"images": self.pictures} if self.pictures > 1 else {}
        return json.dumps(
            {"prompt": self.prompt, "seed": self.seed, **images, **self._said()}, ensure_ascii=False
        )

    def python(self, model: str, files: Mapping[str, str] | None = None) -> str:
        """Return the lines of Python that make the same pictures. files: of samplers that have been named."""
        said = self._said()
        if self.sampler in (files or {}):
            said["sampler"] = (files or {})[self.sampler]
        arguments = ", ".join(f"{name}={value!r}" for name, value in said.items())
        seeds = list(range(self.seed, self.seed + self.pictures))
        return (
            "import diffplug\nfrom diffplug.recipe import Recipe\n\n"
            f"pipe = diffplug.load({model!r})\n"
            f"recipe = Recipe({arguments})\n"
            f"pictures = recipe.run(pipe, {[self.prompt] * self.pictures!r}, {seeds})\n"
            "pictures.images[0].save('picture.png')\n"
        )


def restored(settings: Mapping[str, Any], choices: Choices) -> tuple[Form, list[str]]:
    """Return the form that a picture's settings say, and what of them the page cannot set.

    Raises ValueError where they hold no prompt.
    """
    values: dict[str, Any] = {}
    told: list[str] = []
    if not isinstance(settings.get("prompt"), str):
        raise ValueError("the settings in the picture hold no prompt: nothing was set")
    named = {"sampler": OWN, "steer": NO_STEERER, **settings}
    checks = {"sampler": choices.samplers, "steer": choices.steerers, "reward": choices.rewards}
    for name, value in named.items():
        try:
            if name in ("prompt", "negative_prompt"):
                values[name] = limits.text(name, value, empty=name != "prompt")
            elif name in checks:
                values[name] = limits.choice(name, value, checks[name])
            elif name in limits.LIMITS:
                values[name] = limits.number(name, value)
            elif name not in ("model", "dtype", "used", "rewards", "files", "particle", "label"):
                told.append(f"{name} {str(value)[:60]} is no control of this page")
        except ValueError as error:
            told.append(f"{error}: not taken")
    if settings.get("model", choices.model) != choices.model:
        told.append(
            f"it was made with the model {str(settings['model'])[:60]}, this page runs {choices.model}"
        )
    if "guidance" not in values and "guidance" in settings.get("used", {}):
        values["guidance"] = limits.number("guidance", settings["used"]["guidance"])
    return Form.read(values, choices), told
