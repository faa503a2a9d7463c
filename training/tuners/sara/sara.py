"""SaRA (arXiv 2409.06633): train the smallest weights of a model, wherever they are, by any optimiser.

    tuner = SaRA(pipe.unet, density=0.05)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=tuner.learning_rate, weight_decay=0)
    tuner.attach(optimizer)
    ...                                     # loss.backward(); optimizer.step(); optimizer.zero_grad()
    tuner.save("style.sara.safetensors")

A hook takes the chosen entries out of each dense gradient as soon as it is there, and the dense one goes: one
layer's gradient is alive at a time, and optimiser, average and file have the size of what is trained. The
learning vectors are float32 masters, so that bfloat16 weights learn as well. Everything outside the choice
stays as it is, to the bit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.sara.delta import SparseDelta
from diffplug.sara.file import save_delta
from diffplug.sara.targets import TRAINED, components_of, refuse_loaded
from diffplug.training.tuners.sara import distributed
from diffplug.training.tuners.sara.candidates import candidates, checked, warn_if_compiled
from diffplug.training.tuners.sara.entry import Entry
from diffplug.training.tuners.sara.progressive import Progressive
from diffplug.training.tuners.sara.rank import RankTerm
from diffplug.training.tuners.sara.saved import deltas_of, state_of, take_state
from diffplug.training.tuners.sara.scores import Score, of_parameters, score_of
from diffplug.training.tuners.sara.select import choose, choose_per_layer, parse_budget

__all__ = ["DENSITY", "SaRA"]

DENSITY = 0.058  # 50 million weights of Stable Diffusion 1.5


class SaRA:
    """Vectors of the smallest weights of one or more modules, and the hooks that make them learn.

    components: a module, or modules by name; move them to their device first. density: share of the weights
    to train (0.058 without any of the three); budget: their number, as "50M"; threshold: all |w| below it.
    score: "magnitude", "random", "largest", or a function (name, weight) -> scores of which the smallest are
    trained. per_layer: the same density in every tensor instead of one threshold for all. include, exclude:
    names or patterns of tensors ("down_blocks", "*.attn2.*"). include_1d: biases and scales of norms too, as
    published; without it tensors of two axes or more. progressive: optimiser step after which only those go
    on that are still below the threshold, or a `Progressive`. rank: a `RankTerm`, or its weight, that
    keeps the trained matrices of low rank. seed: of the score "random".

    Raises ValueError, with nothing changed, for quantised or meta weights, fused LoRAs and loaded deltas,
    wrapped models, names that match nothing, sizes out of range, whole pipelines, and weights that another
    SaRA trains. Warns of a model that is compiled as a whole.
    """

    def __init__(
        self,
        components: nn.Module | Mapping[str, nn.Module],
        *,
        density: float | None = None,
        budget: int | str | None = None,
        threshold: float | None = None,
        score: str | Score = "magnitude",
        per_layer: bool = False,
        include: Sequence[str] | str = (),
        exclude: Sequence[str] | str = (),
        include_1d: bool = False,
        progressive: int | Progressive | None = None,
        rank: RankTerm | float | None = None,
        seed: int = 0,
    ) -> None:
        if sum(value is not None for value in (density, budget, threshold)) > 1:
            raise ValueError(
                "give one of density, budget and threshold: each of them says how many are trained"
            )
        if hasattr(components, "components"):
            raise ValueError("a whole pipeline, decoder and all: give what is to learn, as pipe.unet")
        self.modules = checked(components_of(components))
        for name, module in self.modules.items():
            refuse_loaded(name, module)
        self.progressive = Progressive.of(progressive, score)
        self.rank = RankTerm(float(rank)) if isinstance(rank, (int, float)) else rank
        weights = candidates(self.modules, include, exclude, include_1d)
        self.shards = distributed.Shards.of(weights.values())
        self._select(weights, density, budget, threshold, of_parameters(score_of(score, seed)), per_layer)
        self.steps = 0
        self.on_adjust: list[Callable[[dict[str, Tensor]], None]] = []
        self._flags = {p: p.requires_grad for m in self.modules.values() for p in m.parameters()}
        self._hooks: list[Any] = []
        self._averaged = True
        self._hook()

    def _select(
        self,
        weights: dict[str, nn.Parameter],
        density: float | None,
        budget: int | str | None,
        threshold: float | None,
        score: Score,
        per_layer: bool,
    ) -> None:
        total = sum(value.numel() for value in weights.values())
        share = DENSITY if density is None and budget is None else density
        count = round(share * total) if share is not None else parse_budget(budget or 0)
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {share:g}")
        if per_layer and (threshold is not None or share is None):
            raise ValueError("per_layer takes a density: the same share of every tensor")
        if threshold is not None and not threshold > 0:
            raise ValueError(f"threshold must be above 0, got {threshold:g}")
        if not 1 <= count <= total:
            raise ValueError(f"{count} weights are to be trained, the model has {total}: take another size")
        thresholds: dict[str, float] = {}
        if per_layer and share is not None:
            choice, thresholds = choose_per_layer(weights, score, share, shards=self.shards)
        elif threshold is not None:
            choice = choose(weights, score, threshold=threshold, shards=self.shards)
        else:
            choice = choose(weights, score, count=count, shards=self.shards)
        if not choice.count:
            raise ValueError("nothing would be trained: take a larger density, or a higher threshold")
        self.count, self.total, self.threshold = choice.count, choice.total, choice.threshold
        distributed.check_same(self.count)
        lengths = self.shards.sum(torch.tensor([len(choice.index[name]) for name in weights]))
        self.entries: list[Entry] = []
        for (key, value), length in zip(weights.items(), lengths.tolist(), strict=True):
            component, name = key.split(".", 1)
            if length:
                own = thresholds.get(key, choice.threshold)
                self.entries.append(Entry(component, name, value, choice.index[key], own))

    @property
    def density(self) -> float:
        """The share of the weights that is trained."""
        return self.count / self.total

    @property
    def learning_rate(self) -> float:
        """A rate to begin with: max(1e-5, 1e-3 exp(-12 density)), the published rule in terms of density."""
        return max(1e-5, 1e-3 * math.exp(-12 * self.density))

    def parameters(self) -> list[nn.Parameter]:
        """Return the learning vectors, for an optimiser."""
        return [entry.vector for entry in self.entries]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the learning vectors by component and tensor."""
        return {entry.key: entry.vector for entry in self.entries}

    # ------------------------------------------------------------------------------------------- training

    def _hook(self) -> None:
        """Freeze all that is not trained, and stand at every gradient and every forward."""
        trained = {entry.weight: entry for entry in self.entries}
        if any(hasattr(weight, TRAINED) for weight in trained):
            raise ValueError(
                "another SaRA trains these weights already: call its detach(), or load the model anew"
            )
        for parameter in self._flags:
            parameter.requires_grad_(parameter in trained)
        for weight, entry in trained.items():
            weight.grad = None
            setattr(weight, TRAINED, True)
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._gatherer(entry)))
            self._hooks.append(entry.vector.register_post_accumulate_grad_hook(self._marker(entry)))
        for module in self.modules.values():
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self.sync()))

    def _gatherer(self, entry: Entry) -> Callable[[Tensor], None]:
        def gather(weight: Tensor) -> None:
            entry.gather(weight)
            self._averaged = False

        return gather

    @staticmethod
    def _marker(entry: Entry) -> Callable[[Tensor], None]:
        def mark(vector: Tensor) -> None:
            entry.stale = True

        return mark

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Write into the weights after each of the optimiser's steps, and do what belongs around a step.

        Without it the weights are brought up to date before the next forward; rank term, progressive
        adjustment and averaging over processes need it. Accelerate's prepared optimisers work. Raises
        ValueError for an optimiser of the dense parameters.
        """
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        own = {id(entry.vector) for entry in self.entries}
        dense = {id(entry.weight) for entry in self.entries} | {id(p) for p in self._flags}
        held = [id(p) for group in inner.param_groups for p in group["params"]]
        if any(one in dense for one in held):
            raise ValueError(
                "this optimiser was built on the model's dense parameters: build it on tuner.parameters()"
            )
        if missing := len(own - set(held)):
            raise ValueError(
                f"the optimiser lacks {missing} of the {len(own)} vectors: build it on tuner.parameters()"
            )
        for name, module in self.modules.items():
            warn_if_compiled(name, module)
        before = inner.register_step_pre_hook(lambda *_: self._before())
        after = inner.register_step_post_hook(lambda opt, *_: self._after(opt))
        self._hooks += [before, after]

    def average_gradients(self) -> None:
        """Average gradients over processes; done right before the step where it was not done by hand.

        Call it before clipping, and before a GradScaler's `unscale_`.
        """
        if not self._averaged and self.shards.group is None and distributed.copies() > 1:
            distributed.average_gradients(self.parameters())
        self._averaged = True

    def _before(self) -> None:
        self.average_gradients()
        if self.rank is not None and self.rank.mode == "coupled":
            self.rank.into_gradients(self.entries, self.steps)

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self.rank is not None and self.rank.mode == "decoupled":
            rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
            self.rank.after_step(self.entries, self.steps, lambda entry: float(rates[id(entry.vector)]))
        self.steps += 1
        self.write()
        if self.progressive is not None and self.steps == self.progressive.after:
            self.adjust(optimizer)

    def write(self) -> None:
        """Bring what has been learnt into the weights."""
        for entry in self.entries:
            entry.write()

    def sync(self) -> None:
        """Bring into the weights what has changed since the last time; cheap where nothing has."""
        for entry in self.entries:
            if entry.behind:
                entry.write()

    @torch.no_grad()
    def adjust(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Let only those entries go on that are still below the threshold; return how many, by tensor.

        The others keep what they learnt and belong to the file. Moments of those that go on are kept, or
        begin anew where `Progressive` says so; the vectors stay the same objects, so schedulers and
        wrappers of the optimiser notice nothing.
        """
        lives: dict[str, Tensor] = {}
        for entry in self.entries:
            live = torch.nonzero(entry.vector.abs() < entry.threshold)[:, 0]
            if optimizer is not None:
                self._slice_state(getattr(optimizer, "optimizer", optimizer).state.get(entry.vector), live)
            entry.keep(live)
            lives[entry.key] = live
            if not int(self.shards.sum(torch.tensor(len(live)))):
                entry.weight.requires_grad_(False)
        for told in self.on_adjust:
            told(lives)
        return {key: len(live) for key, live in lives.items()}

    def _slice_state(self, state: dict[str, Any] | None, live: Tensor) -> None:
        fresh = self.progressive is not None and self.progressive.fresh_moments
        for name, value in list((state or {}).items()):
            if isinstance(value, Tensor) and value.ndim == 1:
                state[name] = torch.zeros_like(value[live]) if fresh else value[live]  # type: ignore[index]
            elif fresh and name == "step":
                state[name] = value * 0  # type: ignore[index]

    # ---------------------------------------------------------------------------------------- on and off

    def detach(self) -> None:
        """Take the hooks off and let everything learn that did before; the weights stay as trained."""
        self.sync()
        while self._hooks:
            self._hooks.pop().remove()
        for entry in self.entries:
            vars(entry.weight).pop(TRAINED, None)
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    @contextmanager
    def original(self) -> Iterator[None]:
        """A block in which the modules compute what they did at first, to the bit; without gradients."""
        self.sync()
        for entry in self.entries:
            entry.restore()
        try:
            with torch.no_grad():
                yield
        finally:
            for entry in self.entries:
                entry.write_frozen()
                entry.write()

    # --------------------------------------------------------------------------------------------- state

    def delta(
        self, vectors: Mapping[str, Tensor] | None = None, info: Mapping[str, Any] | None = None
    ) -> SparseDelta:
        """Return what has been learnt, as a file holds it.

        vectors: to take in place of the current ones (an average), by the names of `named_parameters`. Under
        FSDP2 all processes call it together.
        """
        classes = {name: type(module).__name__ for name, module in self.modules.items()}
        deltas = deltas_of(self.entries, self.shards, vectors)
        return SparseDelta(deltas, classes, {**self._info(), **(info or {})})

    def _info(self) -> dict[str, Any]:
        base = {name: getattr(module, "name_or_path", "") for name, module in self.modules.items()}
        return {
            "threshold": self.threshold,
            "density": self.density,
            "count": self.count,
            "steps": self.steps,
            "progressive": None if self.progressive is None else self.progressive.after,
            "base": {name: str(path) for name, path in base.items() if path},
        }

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str = "float16",
        vectors: Mapping[str, Tensor] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `*.sara.safetensors` (see `diffplug.sara.save_delta`), and return its path."""
        return save_delta(self.delta(vectors, info), path, dtype=dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return vectors, frozen entries and the number of steps, to go on from on the same base."""
        return {"steps": self.steps, **state_of(self.entries)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; ValueError where it belongs to another choice of weights."""
        take_state(self.entries, state)
        self.steps = int(state["steps"])
        self.write()
