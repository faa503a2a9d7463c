"""The studio: pictures for several users from one model, each made once, with what they cost."""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from PIL import Image

from diffplug import rewards
from diffplug.demos.batch.plan import FORMAT, canonical, digest, picture_id
from diffplug.demos.studio.form import Choices, Form
from diffplug.demos.studio.limits import MOST_CELLS, SECONDS
from diffplug.demos.studio.pool import Control, Pool
from diffplug.demos.studio.preview import Colours, Preview
from diffplug.files import output_folder
from diffplug.making import Row, fingerprints, versions
from diffplug.making.png import save_png
from diffplug.recipe.batches import batches

__all__ = ["Cell", "Made", "Step", "Studio"]

_KEPT_BYTES = 32 * 2**20
"""Of the pixels that are kept in memory: 2,700 pictures of Shapes, ten of 1024 by 1024."""


@dataclass(frozen=True)
class Step:
    """A step was taken. preview: the clean picture it saw, or None where none was drawn."""

    done: int
    of: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Made:
    """A picture, or all particles of one; what it cost, and whether it was made for this request.

    evaluations: of the network. report: of the steerer. rewards: what each picture reached, or None.
    """

    form: Form
    images: tuple[Image.Image, ...]
    evaluations: float
    seconds: float
    rewards: tuple[float | None, ...] = (None,)
    report: Any = None
    reused: bool = False

    @property
    def bytes(self) -> int:
        """Return how much its pixels take."""
        return sum(3 * image.width * image.height for image in self.images)

    def line(self) -> str:
        """Return what it cost, in words."""
        parts = [f"{self.evaluations:.0f} evaluations", f"{self.seconds:.2f} s", f"seed {self.form.seed}"]
        reached = [one for one in self.rewards if one is not None]
        if reached:
            parts.append(f"{self.form.reward} {max(reached):.3f}")
        return ", ".join(parts) + (" (made before)" if self.reused else "")


@dataclass(frozen=True)
class Cell:
    """A cell of a grid, by its place."""

    row: int
    column: int
    made: Made


class Studio:
    """Makes what forms ask for. copies: requests that run at once. folder: where pictures are kept too.

    identity: name and version of the model as the ids of `diffplug batch` have it; its name if not given.
    """

    def __init__(
        self,
        pipe: Any,
        choices: Choices,
        *,
        copies: int = 1,
        folder: Path | None = None,
        dtype: str = "float32",
        seconds: float = SECONDS,
        identity: str | None = None,
    ) -> None:
        self.choices, self.folder = choices, None if folder is None else output_folder(folder)
        self.setup = {"model": choices.model, "dtype": dtype}
        self.pool, self.colours = Pool(pipe, copies, seconds=seconds), Colours.fit(pipe)
        self.identity = identity or f"{choices.model}:{dtype}"
        self._kept: OrderedDict[str, Made] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._held = [rewards.get(name) for name in choices.rewards]

    def read(self, values: dict[str, Any]) -> Form:
        """Return the form of values from outside. Raises ValueError of one line."""
        return Form.read(values, self.choices)

    def make(self, form: Form) -> Iterator[Step | Made]:
        """Yield steps with previews and then every picture of a form; those that are there come at once."""
        for single in form.singles():
            if (kept := self.find(single)) is not None:
                yield kept
            else:
                yield from self.pool.run(partial(self._made, single))

    def grid(
        self, form: Form, columns: tuple[str, Sequence[Any]], rows: tuple[str, Sequence[Any]]
    ) -> Iterator[Step | Cell]:
        """Yield the cells of a grid in reading order, with the steps on the way.

        columns, rows: the name of a setting and its values. Every form is checked before the first is made.
        Raises ValueError for more than six values, and for what a form refuses.
        """
        forms = self._cells(form, columns, rows)
        for (y, x), single in forms.items():
            for event in self.make(single):
                yield Cell(y, x, event) if isinstance(event, Made) else event

    def find(self, form: Form) -> Made | None:
        """Return a picture that was made before, here or in the folder."""
        key = self.key(form)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return replace(self._kept[key], reused=True)
        return self._from_folder(form, key)

    def key(self, form: Form) -> str:
        """Return the id of a picture, whoever asks for it: the one that `diffplug batch` gives it."""
        recipe = form.recipe()
        group = {"v": FORMAT, "model": self.identity, **recipe.settings(), "files": fingerprints(recipe)}
        name = picture_id(canonical(group), form.prompt, form.seed)
        return digest([name, "all"]) if form.all_particles and form.steered else name

    def _cells(
        self, form: Form, columns: tuple[str, Sequence[Any]], rows: tuple[str, Sequence[Any]]
    ) -> dict[tuple[int, int], Form]:
        for name, values in (columns, rows):
            if name not in AXES:
                raise ValueError(f"{name!r} is no axis: take one of {', '.join(AXES)}")
            if not 1 <= len(values) <= MOST_CELLS:
                raise ValueError(f"{name} has {len(values)} values: give 1 to {MOST_CELLS}")
        if columns[0] == rows[0] and len(rows[1]) > 1:
            raise ValueError(f"both axes are {columns[0]}: choose another for one of them")
        base = {name: getattr(form, name) for name in form.__dataclass_fields__} | {"pictures": 1}
        places = itertools.product(enumerate(rows[1]), enumerate(columns[1]))
        forms = {
            (y, x): self.read({**base, rows[0]: down, columns[0]: across})
            for (y, down), (x, across) in places
        }
        steps = sum(one.steps * (one.particles if one.steered else 1) for one in forms.values())
        if steps > 6_400:
            raise ValueError(f"the grid costs {steps:,} evaluations, and 6,400 are allowed: take fewer steps")
        return forms

    def _made(self, form: Form, pipe: Any, control: Control) -> None:
        """Make one picture on a pipeline of the pool, and keep it."""
        frames: list[Image.Image] = []

        def on_step(done: int, of: int) -> None:
            control.step()
            control.give(Step(done, of, frames.pop() if frames else None))

        start, recipe = perf_counter(), form.recipe()
        preview = Preview(pipe, self.colours, frames.append)
        for batch in batches(
            recipe, pipe, [form.prompt], [form.seed], max_rows=64, on_step=on_step, plugs=[preview]
        ):
            row, seconds = Row(recipe, form.prompt, form.seed, self.setup), perf_counter() - start
            images = tuple(
                self._labelled(image, row, piece, batch, place, seconds)
                for place, (image, piece) in enumerate(zip(batch.images, row.pieces, strict=True))
            )
            made = Made(form, images, batch.evaluations, seconds, tuple(batch.rewards), batch.report)
        self._keep(form, made)
        control.give(made)

    def _labelled(
        self, image: Image.Image, row: Row, piece: int | None, batch: Any, place: int, seconds: float
    ) -> Image.Image:
        """Return the picture with its settings in it: a PNG of it, also a downloaded one, carries them."""
        reward = batch.rewards[place]
        reached = {} if reward is None else {"rewards": {row.recipe.reward: reward}}
        cost = {"evaluations": batch.evaluations, "seconds": round(seconds, 2)}
        used = {**batch.used, **cost, "versions": versions()}
        image.info["diffplug"] = json.dumps({**row.settings(piece), "used": used, **reached}, allow_nan=False)
        return image

    def _keep(self, form: Form, made: Made) -> None:
        key = self.key(form)
        with self._lock:
            if (before := self._kept.pop(key, None)) is not None:
                self._bytes -= before.bytes
            self._kept[key] = made
            self._bytes += made.bytes
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].bytes
        if self.folder is not None and len(made.images) == 1:
            image = made.images[0]
            save_png(image, self.folder / f"{key}.png", json.loads(image.info["diffplug"]))

    def _from_folder(self, form: Form, key: str) -> Made | None:
        path = None if self.folder is None else self.folder / f"{key}.png"
        if path is None or not path.is_file():
            return None
        with suppress(OSError, ValueError, KeyError):
            with Image.open(path) as opened:
                image = opened.convert("RGB")
                image.info["diffplug"] = opened.info["diffplug"]
            settings = json.loads(image.info["diffplug"])
            reached = next(iter(settings.get("rewards", {}).values()), None)
            used = settings["used"]
            made = Made(form, (image,), used["evaluations"], used.get("seconds", 0.0), (reached,))
            return replace(made, reused=True)
        return None


AXES = ("sampler", "steps", "guidance", "seed", "steer", "particles", "prompt")
"""Settings that a grid can vary."""
