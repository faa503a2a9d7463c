"""Empirical statistics of a model, which "ems" steps stand on (DPM-Solver-v3, arXiv 2310.13268).

Along lambda, for each element of the latents: l makes the network's change with x small, s and b what is left
of its change along a trajectory. An "ems" step integrates g, noise prediction less the part that l foresees,

    f_j = (sigma_j E_j - l_j X_j) / alpha_j        g_j = e^(-S_j) f_j - B_j
    L = int l,  S = int s,  B = int e^(-S) b       all of them from the step's start

so that (l, s, b) = (1, 0, 0) is data prediction and (0, -1, 0) noise prediction.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.integrate import cumulative_simpson

from diffplug.files import atomic_path
from diffplug.messages import reason

__all__ = ["Between", "ModelStatistics", "load_statistics"]

Floats = npt.NDArray[np.float64]
PIECES = 64  # of an integral between two nodes
FORMAT = "diffplug model statistics 1"
NAMES = ("l", "s", "b")


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelStatistics:
    """l, s and b [m, ...] of a model at m lambdas, increasing; between them linear, beyond them constant.

    After the first axis: the shape of the latents, (c, 1, 1) for one number a channel, or nothing for one
    number. told: where they come from, texts. Raises ValueError for arrays that do not fit.
    """

    lambdas: Floats
    l: Floats  # noqa: E741 - the paper's name
    s: Floats
    b: Floats
    told: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("lambdas", *NAMES):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} of the statistics has to hold finite numbers")
        if self.lambdas.ndim != 1 or len(self.lambdas) < 2 or (np.diff(self.lambdas) <= 0).any():
            raise ValueError("lambdas of the statistics have to be two or more increasing numbers")
        for name in NAMES:
            shape, wanted = getattr(self, name).shape, (len(self.lambdas), *self.shape)
            if shape != wanted:
                raise ValueError(f"{name} of the statistics has the shape {shape}, l asks for {wanted}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample's numbers."""
        return tuple(self.l.shape[1:])

    def at(self, name: str, lambdas: Any) -> Floats:
        """l, s or b [m, ...] at m lambdas."""
        table, where = getattr(self, name), np.asarray(lambdas, dtype=np.float64)
        index = np.clip(np.searchsorted(self.lambdas, where) - 1, 0, len(self.lambdas) - 2)
        low, high = self.lambdas[index], self.lambdas[index + 1]
        share = np.clip((where - low) / (high - low), 0.0, 1.0).reshape(-1, *(1,) * len(self.shape))
        return np.asarray((1 - share) * table[index] + share * table[index + 1])

    def between(self, start: float, end: float) -> Between:
        """Their integrals on the way from one lambda to another, in either direction."""
        lams = np.linspace(start, end, PIECES + 1)
        l, s, b = (self.at(name, lams) for name in NAMES)  # noqa: E741
        step = (end - start) / PIECES
        big_l, big_s = _integrals(l, step), _integrals(s, step)
        return Between(lams - start, big_l, big_s, _integrals(np.exp(-big_s) * b, step))

    def by_channel(self) -> ModelStatistics:
        """Means over all places: one number for each channel, for latents of any size."""
        axes = tuple(range(2, self.l.ndim))
        means = {name: getattr(self, name).mean(axis=axes, keepdims=True) for name in NAMES}
        return ModelStatistics(lambdas=self.lambdas, told=self.told, **means)

    def check_fits(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless samples of this shape [...], without the batch, take these numbers."""
        try:
            fits = np.broadcast_shapes(self.shape, shape) == tuple(shape)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"the schedule's statistics are for latents of shape {list(self.shape)}, these have "
                f"{list(shape)}: run that size, or average them over places (ModelStatistics.by_channel)"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as safetensors, float32, whole or not at all."""
        arrays = {"lambdas": self.lambdas}
        arrays |= {name: getattr(self, name).astype(np.float32) for name in NAMES}
        told = {**self.told, "format": FORMAT, "sha256": _hash(arrays)}
        with atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata=told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelStatistics:
        """The statistics in a file of `save`; ValueError names a file that is none, or damaged."""
        try:
            with safe_open(path, framework="np") as file:
                told = dict(file.metadata() or {})
                if told.pop("format", None) != FORMAT:
                    raise ValueError(f"it lacks the mark {FORMAT!r}")
                arrays = {name: file.get_tensor(name) for name in ("lambdas", *NAMES)}
            if told.pop("sha256", None) not in (None, _hash(arrays)):
                raise ValueError("it is damaged: its numbers are not those of the hash in its header")
            return cls(told=told, **arrays)
        except FileNotFoundError as error:
            raise ValueError(
                f"the statistics in {os.fspath(path)!r} are not there: put the file beside the schedule, or "
                "measure them (diffplug schedule measure)"
            ) from error
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise ValueError(
                f"{os.fspath(path)!r} holds no statistics of a model: {reason(error)}"
            ) from error


@dataclass(frozen=True, eq=False)
class Between:
    """Integrals [PIECES + 1, ...] from a start on, at so many lambdas, told as distances from it."""

    offsets: Floats
    l: Floats  # noqa: E741
    s: Floats
    b: Floats

    def moment(self, k: int) -> Floats:
        """int e^(L + S) (lambda - start)^k / k! over the whole way, times e^-L of its end."""
        places = self.offsets**k / math.factorial(k)
        return self._weighed(places.reshape(-1, *(1,) * (self.l.ndim - 1)))

    def constant(self) -> Floats:
        """int e^(L + S) B over the whole way, times e^-L of its end."""
        return self._weighed(self.b)

    def _weighed(self, values: Floats) -> Floats:
        weights = np.exp(self.l + self.s - self.l[-1])
        return np.asarray(_integrals(weights * values, self.offsets[1])[-1])


def _hash(arrays: Mapping[str, Any]) -> str:
    """A hash of arrays by name, type and content."""
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name}{values.dtype}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def load_statistics(path: str | os.PathLike[str]) -> ModelStatistics:
    """The statistics of a file, kept as long as the file does not change."""
    place = Path(path)
    changed = place.stat().st_mtime_ns if place.exists() else 0
    return _loaded(str(place), changed)


@lru_cache(maxsize=4)
def _loaded(path: str, changed: int) -> ModelStatistics:
    return ModelStatistics.load(path)


def _integrals(values: Floats, step: float) -> Floats:
    """Integrals [m, ...] of values [m, ...] at equal distances from the first place to each."""
    return np.asarray(step * cumulative_simpson(values, dx=1.0, axis=0, initial=0.0))
