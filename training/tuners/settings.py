"""The table [tuner] of a training config: which weights move, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffplug.registry import unknown

__all__ = ["KINDS", "PEFT_KINDS", "TunerSettings"]

PEFT_KINDS = ("dora", "rslora", "oft", "loha", "lokr", "hra")
KINDS = ("lora", "full", "sara", *PEFT_KINDS)
_SPARSE = {
    "density": None,
    "budget": None,
    "threshold": None,
    "score": "magnitude",
    "per_layer": False,
    "include": (),
    "exclude": (),
    "include_1d": False,
}


@dataclass(frozen=True, kw_only=True)
class TunerSettings:
    """Which weights move.

    kind: "lora"; "full" for all weights; "sara" for the smallest ones; or a tuner of peft: "dora", "rslora",
    "oft", "loha", "lokr", "hra". rank: of the low-rank ones, block size of "oft". alpha: the update is scaled
    by alpha / rank; None takes the rank. targets: ends of layer names, empty for every linear and convolution
    layer. extract: after "full", the change is cut to a LoRA of this rank. save_dtype: of the file. The rest
    is for "sara", as in `diffplug.training.SaRA`: density, budget or threshold, score, per_layer, include,
    exclude, include_1d.
    """

    kind: str = "lora"
    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    extract: int | None = None
    save_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    density: float | None = None
    budget: int | str | None = None
    threshold: float | None = None
    score: str = "magnitude"
    per_layer: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    include_1d: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("tuner", self.kind, list(KINDS))
        for name in ("rank", "extract"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if self.extract is not None and self.kind != "full":
            raise ValueError("extract is for tuner.kind=full: a LoRA has its rank already")
        for name, default in _SPARSE.items():
            if self.kind != "sara" and getattr(self, name) != default:
                raise ValueError(
                    f"tuner.{name} is for tuner.kind=sara, and would do nothing with {self.kind}"
                )
        if self.targets and self.kind in ("sara", "full"):
            raise ValueError(
                f"tuner.targets is for adapters: with tuner.kind={self.kind} "
                + ("name tensors by tuner.include" if self.kind == "sara" else "everything moves")
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density:g}")
