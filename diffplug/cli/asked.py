"""What a command that makes pictures was asked for: options, a picture's settings, prompts and their rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from diffplug import rewards
from diffplug.cli.pipeline import load_pipeline
from diffplug.making import Row
from diffplug.making.picture_settings import RECIPE, STEERING, settings_of_picture
from diffplug.placing import Memory, device_of, dtype_of
from diffplug.recipe import Recipe
from diffplug.recipe.prompt_file import Prompt, check_prompt, read_prompts
from diffplug.recipe.text import read_options
from diffplug.registry import STEERERS, unknown

__all__ = ["Asked", "split_options"]


@dataclass(frozen=True)
class Asked:
    """The options of a command by name, a picture's settings where they were left out, and the recipe."""

    values: Mapping[str, Any]
    recipe: Recipe
    prompt: str | None = None

    @classmethod
    def of(cls, context: typer.Context, source: Path | None = None) -> Asked:
        """Return what a command was asked for. Raises ValueError for what would do nothing."""
        start = {} if source is None else settings_of_picture(source)
        given = {name for name in context.params if _is_given(context, name)}
        values = {**context.params, **{key: value for key, value in start.items() if key not in given}}
        steer = values.get("steer")
        for name in (*STEERING, "returns"):
            if steer is None and name in given:
                raise ValueError(
                    f"--{name} {values[name]} acts only with --steer: add --steer fk, or leave it out"
                )
        if (values.get("negative_prompt") or "").strip():
            check_prompt("the negative prompt", values["negative_prompt"])
        mine, call = split_options(steer, values.get("option") or [])
        if values.get("returns") is not None:
            mine["returns"] = values["returns"]
        settings = {name: values[name] for name in (*RECIPE, *(STEERING if steer else ()))}
        recipe = Recipe(
            steer=steer,
            options={**start.get("options", {}), **mine} if steer else {},
            call={**start.get("call", {}), **call},
            **settings,
        )
        return cls(values, recipe, start.get("prompt"))

    def rows(self, words: Sequence[str], file: Path | None) -> list[Row]:
        """Return a row for every picture. Raises ValueError for prompts that cannot be used, or none."""
        asked = [*self._prompts(words), *(read_prompts(file) if file is not None else ())]
        if not asked and self.prompt is not None:
            asked = [Prompt(self.prompt)]
        if not asked:
            raise ValueError("what should the pictures show? Give a prompt, or --prompts FILE")
        setup, seeds = self._setup(), _seeds(asked, self.values["images"], self.values["seed"])
        recipes = [self._recipe(prompt) for prompt in asked for _ in range(self.values["images"])]
        texts = [prompt.text for prompt in asked for _ in range(self.values["images"])]
        return [Row(*row, setup) for row in zip(recipes, texts, seeds, strict=True)]

    def _prompts(self, words: Sequence[str]) -> Iterator[Prompt]:
        for number, text in enumerate(words, 1):
            check_prompt(f"prompt {number}", text)
            yield Prompt(text)

    def _recipe(self, prompt: Prompt) -> Recipe:
        return (
            self.recipe if prompt.negative is None else replace(self.recipe, negative_prompt=prompt.negative)
        )

    def _setup(self) -> dict[str, Any]:
        """Return what tells pictures apart beside the recipe."""
        model, where = self.values["model"], device_of(self.values["device"])
        setup = {"model": model, "dtype": dtype_of(self.values["dtype"], model, where)}
        return setup | ({"vae_tiling": True} if self.values["vae_tiling"] else {})

    def memory(self) -> Memory:
        """Return how to spare memory."""
        return Memory(*(self.values[name] for name in ("offload", "vae_tiling", "vae_slicing")))

    def ready_reward(self, prompts: Sequence[str]) -> Any:
        """Return the reward, loaded and tried on the words of all prompts; None without a steerer."""
        return None if self.recipe.steer is None else ready_reward(self.recipe.reward, prompts)

    def load(self, rows: Sequence[Row], memory: Memory) -> Any:
        """Return the pipeline; every recipe of the rows is one that it takes."""
        model, device, dtype = (self.values[name] for name in ("model", "device", "dtype"))
        pipe = load_pipeline(model, device, dtype, [row.prompt for row in rows], memory)
        for recipe in {id(row.recipe): row.recipe for row in rows}.values():
            recipe.check(pipe)
        return pipe


def ready_reward(name: str, prompts: Sequence[str]) -> Any:
    """Return a reward with its networks loaded. Raises ValueError for prompts that it cannot judge."""
    reward = rewards.get(name)
    for part in _parts(reward):
        if hasattr(part, "network"):
            part.network()
        if type(part).__name__ == "ShapesReward":
            _check_shapes_prompts(prompts)
    return reward


def _parts(reward: Any) -> Iterator[Any]:
    """Yield the rewards that a sum or a standardised reward is made of."""
    inner = [*getattr(reward, "rewards", ()), *([reward.reward] if hasattr(reward, "reward") else ())]
    if not inner:
        yield reward
    for one in inner:
        yield from _parts(one)


def _check_shapes_prompts(prompts: Sequence[str]) -> None:
    from diffplug.shapes import parse

    for prompt in dict.fromkeys(prompts):
        try:
            parse(prompt)
        except ValueError as error:
            raise ValueError(
                f"reward 'shapes' grades the Shapes world only: {error} Or choose another --reward"
            ) from error


def split_options(steer: str | None, texts: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the steerer's options, and the arguments of the pipeline's call, from texts like "churn=1.0"."""
    options = read_options(texts)
    known = [] if steer is None else _names_of(STEERERS.get(steer))
    mine = {key: value for key, value in options.items() if key in known}
    call = {key: value for key, value in options.items() if key not in known}
    for key in call:
        if get_close_matches(key, known, n=1, cutoff=0.8):
            raise unknown(f"option of steerer {steer!r}", key[:80], known)
    return mine, call


def _names_of(steerer: Any) -> list[str]:
    """Return the options of a steerer by name: its own, or those of its constructor."""
    names = getattr(steerer, "option_names", None)
    return list(inspect.signature(steerer).parameters) if names is None else list(names())


def _seeds(prompts: Sequence[Prompt], images: int, first: int) -> list[int]:
    """Return the seed of every picture: counted up from a prompt's own, or from the first by its place."""
    slots = [(prompt, i) for prompt in prompts for i in range(images)]
    return [
        first + place if prompt.seed is None else prompt.seed + i for place, (prompt, i) in enumerate(slots)
    ]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")
