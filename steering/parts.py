"""The options of steerers as parts, and the keywords that stood for them before.

FeynmanKac(reward, particles=16, scoring=Scoring(at=(0.5, 0.8)), selection=Resampling("ssp", islands=2))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from diffplug.checks import check_number, check_texts, check_whole
from diffplug.steering.engine.ranks import Ranks
from diffplug.steering.engine.rule import Value
from diffplug.steering.engine.score_times import plan_of
from diffplug.steering.proposals import Churn, Twist
from diffplug.steering.smc.filter import check_threshold
from diffplug.steering.smc.potentials import Adaptive
from diffplug.steering.smc.resampling import check_resampler

C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Scoring:
    """How unfinished particles are judged, and when.

    at: fractions of the run in (0, 1], or "every"; None is the rule's own choice. prompts: texts for the
    reward, one per prompt of the call, where the call has only embeddings. value: what an unfinished state is
    worth (see `diffplug.steering.values`), by default the reward of its clean prediction. decode:
    `decode(pipe, latents, height=, width=, num_frames=, batch_size=) -> images` for the scored calls before
    the end, by default `diffplug.latents.decode`. preview: a small decoder of the same latents for those
    calls, such as an `AutoencoderTiny`; the finished pictures are the pipeline's own. decode_batch_size: rows
    decoded at once, fewer when memory runs out. timeout: seconds that the reward may take for all particles
    of a call; None waits. Raises ValueError for anything out of range.
    """

    at: Sequence[float] | str | None = None
    prompts: str | Sequence[str] | None = None
    value: Value | None = None
    decode: Callable[..., Tensor] | None = None
    preview: Any = None
    decode_batch_size: int = 4
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.at is not None:
            plan_of(self.at)
        if self.preview is not None and self.decode is not None:
            raise ValueError("preview and decode both say how to decode on the way: give one of them")
        if self.decode is not None and not callable(self.decode):
            raise ValueError(
                f"decode={self.decode!r} cannot be called: give decode(pipe, latents, ...) -> images"
            )
        if self.preview is not None and not hasattr(self.preview, "decode"):
            raise ValueError(
                f"preview={self.preview!r} decodes nothing: give an autoencoder, as AutoencoderTiny"
            )
        if self.value is not None and not callable(self.value):
            raise ValueError(f"value={self.value!r} cannot be called: see diffplug.steering.values")
        check_whole("decode_batch_size", self.decode_batch_size)
        check_texts(self.prompts)
        if self.timeout is not None:
            check_number("timeout", self.timeout)
            if not self.timeout > 0:
                raise ValueError(f"timeout={self.timeout}: give seconds above 0, or None to wait")


@dataclass(frozen=True)
class Resampling:
    """How Feynman-Kac selects: by which scheme, how often, and among which particles.

    scheme: "systematic", "stratified", "residual", "ssp" or "multinomial". ess_threshold: resample where the
    effective sample size is below this share of the particles, and carry the weights on otherwise; None
    resamples at every scored call. islands: split the k particles of a prompt into this many islands that
    never meet; by default into pairs (one island for an odd k). Few large islands descend from few start
    noises and stand or fall together; 1 is the published filter. Raises ValueError for anything out of range.
    """

    scheme: str = "systematic"
    ess_threshold: float | None = 0.9
    islands: int | None = None

    def __post_init__(self) -> None:
        check_resampler(self.scheme)
        check_threshold(self.ess_threshold)


@dataclass(frozen=True)
class Network:
    """How the particles go through the network: so many rows at a time, in one process or in several.

    batch_size: rows (guidance counts twice) that the denoiser takes at once; by default all, and fewer when
    memory runs out. ranks: True shares the particles of every prompt among all processes of the job
    (`accelerate launch`), a `Ranks` among those of a group; every process makes the same call and gets the
    same pictures. Raises ValueError for anything out of range.
    """

    batch_size: int | None = None
    ranks: bool | Ranks = False

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_whole("network_batch_size", self.batch_size)
        if not isinstance(self.ranks, (bool, Ranks)):
            raise ValueError(f"ranks={self.ranks!r}: give True, False or Ranks.of(group)")


SCORING, RESAMPLING, NETWORK = Scoring(), Resampling(), Network()  # the defaults
_PARTS: dict[str, type] = {"scoring": Scoring, "selection": Resampling, "network": Network}
_MOVED = {
    "score_at": ("scoring", "at"),
    "prompts": ("scoring", "prompts"),
    "value": ("scoring", "value"),
    "decode": ("scoring", "decode"),
    "preview": ("scoring", "preview"),
    "decode_batch_size": ("scoring", "decode_batch_size"),
    "reward_timeout": ("scoring", "timeout"),
    "resampler": ("selection", "scheme"),
    "ess_threshold": ("selection", "ess_threshold"),
    "populations": ("selection", "islands"),
    "islands": ("selection", "islands"),
    "network_batch_size": ("network", "batch_size"),
    "ranks": ("network", "ranks"),
}
_OTHERS = {
    "churn": "proposal=Churn({!r}), or proposal=None for 0",
    "twist": "proposal=Twist({!r})",
    "spread": "proposal=Twist(2.0, spread={!r})",
    "target_ess": "tilt=Adaptive({!r})",
    "alpha": "strength=1 / {!r}",
}
_WHERE = {
    "churn": "proposal",
    "twist": "proposal",
    "spread": "proposal",
    "target_ess": "tilt",
    "alpha": "block",
}


def option_names(steerer: type) -> list[str]:
    """Return the options of a steerer in their flat form, as recipes and the command line write them."""
    own = {one.name for one in fields(steerer) if one.init}
    parts = {name: part for name, (part, _) in _MOVED.items()} | _WHERE
    return sorted(own | {name for name, part in parts.items() if part in own})


def current_options(steerer: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return options of a steerer as its parts, from flat keywords, and a sentence for each of those.

    What the steerer does not know, under an old name or a new one, is left as it is.
    """
    own = {one.name for one in fields(steerer) if one.init}
    found = {name: value for name, value in given.items() if name in own}
    flat = {name: value for name, value in given.items() if name not in own}
    said = []
    for name, value in flat.items():
        part, attribute = _MOVED.get(name, (_WHERE.get(name, ""), ""))
        if part not in own:
            found[name] = value
            continue
        if attribute:
            kind = _PARTS[part]
            found[part] = replace(found.get(part, getattr(steerer, part)), **{attribute: value})
            said.append(f"{name}= is {part}={kind.__name__}({attribute}=...) now")
        else:
            said.append(f"{name}={value!r} is {_OTHERS[name].format(value)} now")
    if "proposal" in own:
        found |= _proposal(flat)
    if "tilt" in own and "target_ess" in flat:
        Adaptive(flat["target_ess"])
        if found.get("tilt") == "adaptive":
            found["tilt"] = Adaptive(flat["target_ess"])
    if "block" in own and "alpha" in flat:
        found["strength"] = _strength(flat["alpha"], found.get("strength"))
    return found, said


def _proposal(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the proposal that churn, twist and spread stood for."""
    churn, twist = flat.get("churn"), flat.get("twist")
    if churn and twist:
        raise ValueError("twist shifts the noise that a solver adds, churn replaces it: give one of them")
    if twist:
        return {"proposal": Twist(twist, flat.get("spread", 1.0))}
    if churn is None or churn == "auto":
        return {}
    return {"proposal": None if churn == 0 else Churn(churn)}


def _strength(alpha: float, strength: float | None) -> float:
    """Return 1 / alpha. Raises ValueError for alpha <= 0 and for another strength given beside it."""
    check_number("alpha", alpha)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: it must be a finite number above 0; for alpha -> 0 say greedy=True")
    if strength not in (None, 1 / alpha):
        raise ValueError(
            f"alpha={alpha} and strength={strength} disagree: strength is 1 / alpha, give only one"
        )
    return 1 / alpha


def takes_old_keywords(steerer: C) -> C:
    """Return a steerer class whose constructor takes the flat keywords of before too, with a FutureWarning.

    They work for one release.
    """
    own: Any = steerer.__init__  # type: ignore[misc]

    @functools.wraps(own)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        options, said = current_options(steerer, given)
        for sentence in said:
            warnings.warn(f"{steerer.__name__}: {sentence}", FutureWarning, stacklevel=2)
        own(self, *args, **options)

    steerer.__init__ = construct  # type: ignore[misc]
    return steerer
