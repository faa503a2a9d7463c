"""Metrics by name, and those of pictures: feature distances, FID and KID over any extractor, rewards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from diffplug.rewards import parse, score
from diffplug.rewards.user_function import user_function
from diffplug.samplers.search.metric import AGGREGATES, LatentError, Metric, Paired, RobustError
from diffplug.samplers.search.problem import Problem

__all__ = ["EXTRACTORS", "METRIC_FORMS", "FeatureDistance", "Frechet", "Kernel", "OwnDistance", "RewardScore"]
__all__ += ["extractor", "parse_metric"]

Floats = npt.NDArray[np.float64]
Extractor = Callable[[Tensor], Any]
"""Features of pictures [n, 3, h, w] in [0, 1]: a tensor [n, ...], or a list of them, one for each layer."""
BATCH = 16


METRIC_FORMS = (
    "error[:median|trimmed|p95|log]",
    "robust",
    "features[-AGGREGATE]:EXTRACTOR",
    "fid:EXTRACTOR",
    "kid:EXTRACTOR",
    "reward:SPEC",
    "FILE.py:FUNCTION",
)
"""How a metric is written on the command line."""


def pixels(images: Tensor) -> Tensor:
    """The pictures themselves, averaged down to 8 x 8: crude, and there for every model."""
    return adaptive_avg_pool2d(images, 8)


def clip(images: Tensor, *, reward: str = "clip") -> Tensor:
    """The picture side of a CLIP reward: "clip", "shapes-clip", or any spec of one."""
    network = parse(reward).network(images.device)
    return network.image_features(images)


EXTRACTORS: dict[str, Extractor] = {
    "pixels": pixels,
    "clip": clip,
    "shapes-clip": partial(clip, reward="shapes-clip"),
}
"""Extractors by name; any other is named by its place, file.py:function."""


def extractor(name: str) -> Extractor:
    """The extractor of that name or place; ValueError for what is neither."""
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    if ":" not in name:
        raise ValueError(
            f"extractor {name!r} is unknown: take {', '.join(EXTRACTORS)}, or file.py:function that gives "
            "features of pictures [n, 3, h, w]"
        )
    return _own("extractor", name)


@dataclass
class _Known:
    """What was computed for the truth of a problem, once."""

    of: dict[int, tuple[Problem, Any]] = field(default_factory=dict)

    def get(self, problem: Problem, make: Callable[[], Any]) -> Any:
        if id(problem) not in self.of:
            self.of[id(problem)] = (problem, make())
        return self.of[id(problem)][1]


@dataclass(frozen=True)
class FeatureDistance(Paired):
    """Distance of features of the picture from those of the converged one, as LPIPS measures it.

    Every layer's features are scaled to length 1 over the channels; squared differences are averaged over
    places and summed over layers (arXiv 1801.03924, equation 1, with weights 1).
    """

    extract: Extractor = pixels
    label: str = "pixels"
    _known: _Known = field(default_factory=_Known, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"features{'' if self.aggregate == 'mean' else f'-{self.aggregate}'}:{self.label}"

    def marks(self, problem: Problem, final: Floats) -> Floats:
        wanted = self._known.get(problem, lambda: self._layers(problem, problem.reference))
        pairs = zip(self._layers(problem, final), wanted, strict=True)
        return np.sum([((a - b) ** 2).sum(1).flatten(1).mean(1).numpy() for a, b in pairs], axis=0)

    def _layers(self, problem: Problem, final: Floats) -> list[Tensor]:
        return [normalize(layer.flatten(2), dim=1) for layer in _extracted(self.extract, problem, final)]


@dataclass(frozen=True)
class OwnDistance(Paired):
    """A function (pictures, converged pictures) -> n numbers, lower the better."""

    function: Callable[[Tensor, Tensor], Any] = lambda a, b: (a - b).square().flatten(1).mean(1)
    label: str = "picture-mse"
    _known: _Known = field(default_factory=_Known, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.label

    def marks(self, problem: Problem, final: Floats) -> Floats:
        wanted = self._known.get(problem, lambda: problem.pictures(problem.reference))
        found = _asked(self.label, self.function, problem.pictures(final), wanted)
        try:
            return torch.as_tensor(found).detach().cpu().double().numpy()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"metric {self.label!r} gives a {type(found).__name__}: return a number for each picture"
            ) from error


@dataclass(frozen=True)
class RewardScore(Paired):
    """Less a reward of `diffplug.rewards`, which thus grows.

    ceiling: rewards can be flattered, so that a schedule whose latent error is above this many times the best
    preset's counts as the worst.
    """

    reward: Any = None
    label: str = ""
    ceiling: float | None = 1.0  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ceiling is None or not self.ceiling > 0:
            raise ValueError(
                f"ceiling={self.ceiling}: give how many times the best preset's error is allowed"
            )

    @property
    def name(self) -> str:
        return f"reward:{self.label}"

    def marks(self, problem: Problem, final: Floats) -> Floats:
        return -score(self.reward, problem.pictures(final), problem.prompts).numpy()


@dataclass(frozen=True)
class _Distribution:
    """Distances between two sets of pictures: features are the marks, the truth is the other set."""

    extract: Extractor = pixels
    label: str = "pixels"
    _known: _Known = field(default_factory=_Known, repr=False, compare=False)
    paired: ClassVar[bool] = False
    ceiling: ClassVar[float | None] = None
    kind: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.label}"

    def marks(self, problem: Problem, final: Floats) -> Floats:
        layers = _extracted(self.extract, problem, final)
        return torch.cat([layer.flatten(1) for layer in layers], dim=1).double().numpy()

    def value(self, problem: Problem, marks: Floats) -> float:
        if len(marks) < 2:
            raise ValueError(f"metric {self.name!r} compares sets: give at least 2 pairs")
        real = self._known.get(problem, lambda: self.marks(problem, problem.reference))
        return self._distance(torch.from_numpy(real), torch.from_numpy(marks))

    def _distance(self, real: Tensor, fake: Tensor) -> float:
        raise NotImplementedError

    def _computed(self, metric: Any, real: Tensor, fake: Tensor) -> Any:
        metric.set_dtype(torch.float64)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()


class Frechet(_Distribution):
    """Fréchet distance between features of both sets (FID with an extractor of your own)."""

    kind = "fid"

    def _distance(self, real: Tensor, fake: Tensor) -> float:
        made = _torchmetrics().fid.FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1]))
        return float(self._computed(made, real, fake))


class Kernel(_Distribution):
    """Kernel distance between features of both sets (KID): unbiased for small sets."""

    kind = "kid"

    def _distance(self, real: Tensor, fake: Tensor) -> float:
        size = min(len(real), len(fake))
        make = _torchmetrics().kid.KernelInceptionDistance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it keeps all features: they are here anyway
            made = make(feature=_AsTheyAre(real.shape[1]), subsets=1, subset_size=size)
        return float(self._computed(made, real, fake)[0])


class _AsTheyAre(torch.nn.Module):
    """Takes features for pictures, since they are extracted already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def parse_metric(spec: str, *, ceiling: float = 1.0) -> Metric:
    """Return the metric that a text describes: see `METRIC_FORMS`; ValueError quotes what it cannot read.

    ceiling: of rewards, see `RewardScore`.
    """
    head, _, rest = spec.partition(":")
    kind, _, aggregate = head.partition("-")
    if head in ("latent-mse", "error"):
        return LatentError(rest or "mean")
    if spec == "robust":
        return RobustError()
    if spec in AGGREGATES:
        return LatentError(spec)
    if kind == "features" and rest and (not aggregate or aggregate in AGGREGATES):
        return FeatureDistance(aggregate or "mean", extractor(rest), rest)
    if head in ("fid", "kid") and rest:
        return {"fid": Frechet, "kid": Kernel}[head](extractor(rest), rest)
    if head == "reward" and rest:
        return RewardScore(reward=parse(rest), label=rest, ceiling=ceiling)
    if rest:
        return OwnDistance(function=_own("metric", spec), label=spec)
    raise ValueError(f"metric {spec!r} is unknown: write one of {', '.join(METRIC_FORMS)}")


def _own(kind: str, place: str) -> Any:
    """The user's function at a place; errors name it as what it was given for."""
    try:
        return user_function(place)
    except ValueError as error:
        raise ValueError(str(error).replace("reward", kind, 1)) from error


def _asked(label: str, function: Callable[..., Any], *pictures: Tensor) -> Any:
    """What the user's function returns; ValueError for whatever it raises."""
    try:
        return function(*pictures)
    except Exception as error:
        raise ValueError(f"metric {label!r} raised {type(error).__name__}: {error}") from error


def _extracted(extract: Extractor, problem: Problem, final: Floats) -> list[Tensor]:
    """Features [n, c, ...] of the pictures of final samples, layer by layer, float32 on the host."""
    images = problem.pictures(final)
    with torch.no_grad():
        parts = [_listed(extract(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    return [torch.cat(layers).float().cpu()[..., None] for layers in zip(*parts, strict=True)]


def _listed(features: Any) -> list[Tensor]:
    return list(features) if isinstance(features, (list, tuple)) else [features]


def _torchmetrics() -> Any:
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: FID and KID need torchmetrics, pip install torchmetrics"
        ) from error
    return torchmetrics.image
