"""A row of the catalogue: everything that one few-step checkpoint needs, as one frozen value, JSON both ways.

The same schema serves the rows that come with the package, a person's own files and `recipe.json`, which a
trainer writes beside the weights that it saved:

    {"format": "few-step-recipe", "version": 1,
     "name": "my-student-4", "family": "sd15", "kind": "lora",
     "weights": [{"file": "adapter.safetensors", "component": "unet"}],
     "steps": [4], "scheduler": "ListedDDIMScheduler", "timesteps": {"4": [999, 749, 499, 249]},
     "eta": 0.0, "guidance": "off", "licence": "apache-2.0", "source": "trained here",
     "meta": {"method": "tscd", "segments": 4}}

What is left out takes its default.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffplug.files import read_json, write_json
from diffplug.messages import shown
from diffplug.registry import unknown

FORMAT = "few-step-recipe"
VERSION = 1
ANY = "any"
KINDS = ("lora", "sara", "peft", "denoiser", "motion", "pipeline")
GUIDANCE = ("off", "cfg", "embedded", "kept")
GRIDS = ("", "trailing", "tcd", "linspace")
MERGES = ("auto", "runtime", "fuse")
ALPHAS = ("file", "missing", "unknown")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One file of weights, and the part of the pipeline that it belongs to."""

    repo: str = ""
    """Hub repository, "owner/name"; empty for a file on disk."""

    file: str = ""
    """File in the repository; without a repository a path, relative to the folder of the JSON file. Empty for
    a whole pipeline, whose weights `DiffusionPipeline.from_pretrained(repo)` loads."""

    component: str = ""
    """Pipeline component to patch: "unet", "transformer", "transformer_2"; empty for a whole pipeline."""

    revision: str = ""
    """Branch, tag or commit of the repository; empty for its default."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One few-step checkpoint: weights, scheduler, timesteps or sigmas, guidance and scale that go together.

    Raises ValueError for values out of range, and for combinations that contradict each other.
    """

    name: str
    """Unique name: lower case, digits, "-" and "."."""

    aliases: tuple[str, ...] = ()
    """Other names; rows of one method share one ("hyper-sd"), and family and steps choose among them."""

    family: str
    """Architecture of the base, as `families.family_of(pipe)` tells it: "sd15", "sdxl", "flux-dev", ...; or
    "any" where it is not known."""

    base: str = ""
    """Repository of the base the weights were trained on, for people: the family is what is checked."""

    kind: str = "lora"
    """What the weights are: "lora", low-rank on a base; "sara", a sparse delta; "peft", an adapter of another
    kind, with peft's config in the file; "denoiser", all weights of the denoiser of a base; "motion", all
    weights of its motion modules (AnimateDiff);
    "pipeline": the pipeline's own weights are the few-step model, nothing is loaded."""

    weights: tuple[Weights, ...] = ()
    """The files: one; or one for each transformer of a pipeline with two (first the high-noise one)."""

    steps: tuple[int, ...]
    """Allowed numbers of network calls for one picture (each of 2 rows when guidance is "cfg")."""

    default_steps: int = 0
    """Number of steps when none is asked for; 0: the last of `steps`."""

    scheduler: str = ""
    """Scheduler class: of Diffusers, or `ListedDDIMScheduler` or `FlowMatchTCDScheduler` of this package.
    Empty where the pipeline keeps its own."""

    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the configuration of the pipeline's scheduler (shift, prediction_type, ...)."""

    timesteps: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """By number of steps: the timesteps of the evaluations, largest first, of 1000 training timesteps."""

    sigmas: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """By number of steps: flow sigmas in (0, 1] as the pipeline takes them, before the scheduler's shift."""

    grid: str = ""
    """Rule for numbers of steps that have no list. "trailing": timesteps round(1000 - 1000 j / n) - 1; "tcd":
    n of the 50 timesteps 20 i - 1; "linspace": sigmas 1, 1 - 1/n, ..., 1/n; empty: the scheduler's own."""

    seen: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """By number of steps: the timesteps that the network is given, after shift and told-time scaling, where
    they do not depend on the size of the picture. What the tests compare a run with."""

    told_scale: float = 1.0
    """The network is told timestep * told_scale, the scheduler keeps counting the true one (NitroFusion)."""

    eta: float | None = None
    """Noise of each step, 0 none to 1 all, for schedulers that take it in `step` or in their configuration;
    None: the scheduler's and pipeline's default."""

    guidance: str = "off"
    """What guidance does. "off": no classifier-free guidance, one row of the network for each picture; "cfg":
    real guidance at `guidance_scale`, two rows; "embedded": `guidance_scale` is an input of the network, one
    row; "kept": the pipeline ignores or fixes it."""

    guidance_scale: float | None = None
    """Number for "cfg" and "embedded"."""

    guidance_range: tuple[float, float] | None = None
    """Values that the authors advise, where they give a range."""

    negative_prompt: bool = False
    """Whether a negative prompt acts; True only with guidance "cfg"."""

    call: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call, as defaults (max_sequence_length, num_frames, ...)."""

    boundary_ratio: float | None = None
    """Two transformers: share of the timesteps below which the second one takes over; None: as configured."""

    lora_scale: float = 1.0
    """Trained scale alpha / rank. Applied only where a file carries no alpha; one with alphas has it in."""

    alpha: str = "unknown"
    """Whether the published file is known to carry alphas: "file", "missing" or "unknown". For people; what
    is done follows from the file."""

    merge: str = "auto"
    """What is done with a LoRA. "runtime": keep it as an adapter; "fuse": add it to the weights in float32;
    "auto": fuse where nothing speaks against it."""

    licence: str
    """Licence of the weights as stated by their authors; "unknown" where none was seen."""

    source: str
    """Where the values were read: repository and file, card, or arXiv number."""

    verified: bool = True
    """False: some value was read second-hand or not at all; `doubt` says which, and it is told on use."""

    doubt: str = ""
    """The sentence for `verified=False`."""

    refused: str = ""
    """Not empty: a checkpoint that must not be touched, and why; `FewStep` raises this sentence."""

    notes: str = ""
    """Advice for people: resolution, common strengths, known trouble."""

    folder: str = field(default="", compare=False)
    """Where relative files lie: the folder the row was read from. Not part of the JSON."""

    meta: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that a trainer wants to keep: method, teacher, segments, seeds, training steps."""

    def __post_init__(self) -> None:
        for name in ("timesteps", "sigmas", "seen"):
            lists = {int(n): tuple(map(float, values)) for n, values in getattr(self, name).items()}
            object.__setattr__(self, name, MappingProxyType(lists))
        for name in ("scheduler_options", "call", "meta"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "aliases", tuple(self.aliases))
        if self.guidance_range is not None:
            object.__setattr__(self, "guidance_range", tuple(self.guidance_range))
        if not self.default_steps and self.steps:
            object.__setattr__(self, "default_steps", self.steps[-1])
        _check(self)

    def __hash__(self) -> int:
        return hash((self.name, self.family))

    def __reduce__(self) -> Any:
        return _remade, (self.to_json(), self.folder)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, folder: str = "") -> Row:
        """Return the row in a JSON object; ValueError names an unknown key, a missing one or a bad value."""
        values = {key: value for key, value in document.items() if key not in ("format", "version")}
        _check_format(document)
        known = [each.name for each in dataclasses.fields(cls) if each.name != "folder"]
        for key in values:
            if key not in known:
                raise unknown("key of a few-step recipe", key, known)
        for key in ("name", "family", "steps", "licence", "source"):
            if key not in values:
                raise ValueError(f"few-step recipe {values.get('name', '')!r} has no {key!r}: add it")
        try:
            values["weights"] = tuple(_weights(each) for each in values.get("weights", ()))
            return cls(**values, folder=folder)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                f"few-step recipe {values['name']!r}: a value has the wrong type ({error})"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Row:
        """Return the row in a JSON file, or in `recipe.json` of a folder; relative files lie beside it."""
        file = Path(path)
        file = file / "recipe.json" if file.is_dir() else file
        if not file.is_file():
            raise ValueError(
                f"{os.fspath(path)!r} holds no few-step recipe: give a recipe.json, or a folder with one"
            )
        return cls.from_json(_mapping(read_json(file), file), folder=str(file.parent))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what has its default is left out."""
        document: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name != "folder" and value != _default(self, each):
                document[each.name] = _plain(value)
        return document

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the row as a JSON file, whole or not at all."""
        write_json(path, self.to_json())

    @property
    def rows(self) -> int:
        """Rows of the network for each picture in a call: 2 with guidance, else 1."""
        return 2 if self.guidance == "cfg" else 1

    def path(self, weights: Weights) -> Path | None:
        """Return where a file of this row lies on disk; None for one of the hub."""
        return None if weights.repo else Path(self.folder) / weights.file


def _default(row: Row, each: dataclasses.Field[Any]) -> Any:
    """Return the value that a field has when it is left out."""
    if each.name == "default_steps":
        return row.steps[-1]
    return {} if each.default_factory is not dataclasses.MISSING else each.default


def _remade(document: Mapping[str, Any], folder: str) -> Row:
    return Row.from_json(document, folder=folder)


def _mapping(document: Any, file: Path) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise ValueError(f"{os.fspath(file)!r} holds {type(document).__name__}, expected a JSON object")
    return document


def _weights(document: Any) -> Weights:
    if isinstance(document, Weights):
        return document
    if not isinstance(document, Mapping):
        raise ValueError(f"weights are objects with repo, file and component, got {document!r}")
    known = [each.name for each in dataclasses.fields(Weights)]
    for key in document:
        if key not in known:
            raise unknown("key of weights", key, known)
    return Weights(**document)


def _check_format(document: Mapping[str, Any]) -> None:
    kind, version = document.get("format", FORMAT), document.get("version", VERSION)
    if kind != FORMAT:
        raise ValueError(f"format is {kind!r}, expected {FORMAT!r}")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"few-step recipe of version {version!r}: this package reads up to {VERSION}")


def _plain(value: Any) -> Any:
    if isinstance(value, Weights):
        defaults = {each.name: each.default for each in dataclasses.fields(Weights)}
        return {name: item for name, item in vars(value).items() if item != defaults[name]}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


# -------------------------------------------------------------------------------------------------- checks


def _check(row: Row) -> None:
    """Raise ValueError, naming the row, for what cannot be right."""
    trouble = _trouble(row)
    if trouble:
        raise ValueError(f"few-step recipe {row.name!r}: {trouble}")


def _trouble(row: Row) -> str:
    """Return what is wrong with a row, in words; empty when nothing is."""
    if not row.name or row.name != row.name.strip().lower() or not set(row.name) <= _NAME:
        return "a name has lower-case letters, digits, '-' and '.' only"
    for name, allowed in _CHOICES.items():
        if getattr(row, name) not in allowed:
            return f"{name} is {getattr(row, name)!r}, allowed are {', '.join(map(repr, allowed))}"
    return _bad_numbers(row) or _bad_lists(row) or _bad_weights(row) or _bad_words(row)


_NAME = set("abcdefghijklmnopqrstuvwxyz0123456789-.")
_CHOICES = {"kind": KINDS, "guidance": GUIDANCE, "grid": GRIDS, "merge": MERGES, "alpha": ALPHAS}


def _bad_numbers(row: Row) -> str:
    if not row.steps or not all(_whole(n) for n in row.steps):
        return f"steps are whole numbers from 1 to 1000, got {list(row.steps)}"
    if row.default_steps not in row.steps:
        return f"default_steps is {row.default_steps}, which is not among the steps {list(row.steps)}"
    for name in ("lora_scale", "told_scale"):
        value = getattr(row, name)
        if not (_real(value) and value > 0):
            return f"{name} is {value!r}, allowed are finite numbers above 0"
    if row.eta is not None and not (_real(row.eta) and 0 <= row.eta <= 1):
        return f"eta is {row.eta!r}, allowed is 0 to 1"
    if row.boundary_ratio is not None and not (_real(row.boundary_ratio) and 0 < row.boundary_ratio < 1):
        return f"boundary_ratio is {row.boundary_ratio!r}, allowed is a number between 0 and 1"
    scaled = row.guidance in ("cfg", "embedded")
    if scaled != (row.guidance_scale is not None):
        return f"guidance {row.guidance!r} {'needs' if scaled else 'takes no'} guidance_scale"
    if row.guidance_scale is not None and not (_real(row.guidance_scale) and row.guidance_scale >= 0):
        return f"guidance_scale is {row.guidance_scale!r}, allowed are finite numbers of at least 0"
    return ""


def _bad_lists(row: Row) -> str:
    for name, highest in (("timesteps", 1000.0), ("sigmas", 1.0)):
        for n, values in getattr(row, name).items():
            falling = all(a > b for a, b in pairwise(values))
            inside = all(0 <= v <= highest for v in values)
            if len(values) != n or not falling or not inside:
                return f"{name} for {n} steps are {list(values)}: give {n} falling numbers up to {highest:g}"
    if row.timesteps and row.sigmas:
        return "it has timesteps and sigmas: give one of the two"
    return ""


def _bad_weights(row: Row) -> str:
    if row.refused:
        return ""
    if row.kind == "pipeline":
        return "" if all(w.repo and not w.file for w in row.weights) else "a whole pipeline has no files"
    if not row.weights:
        return f"kind {row.kind!r} needs weights: a list of objects with file and component"
    for weights in row.weights:
        if not weights.file or not weights.component:
            return f"kind {row.kind!r} needs a file and a component, got {_plain(weights)}"
        parts = Path(weights.file).parts
        if Path(weights.file).is_absolute() or ".." in parts:
            return f"file {weights.file!r} leads outside its folder: give a path below it"
    return ""


def _bad_words(row: Row) -> str:
    for name in ("base", "scheduler", "licence", "source", "doubt"):
        if not isinstance(value := getattr(row, name), str):
            return f"{name} is {shown(value)}, a text is expected"
    if row.negative_prompt and row.guidance != "cfg":
        return "negative_prompt acts only with guidance 'cfg'"
    if row.verified == bool(row.doubt):
        return "verified=False needs a doubt that says what was not seen; verified=True has none"
    if not row.licence or not row.source:
        return "licence and source must not be empty ('unknown' where none was seen)"
    return ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1000


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
