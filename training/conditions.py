"""What a denoiser is told beside the state and the time, read from the pipeline itself, for any family.

A pipeline is run up to its first scheduler step, and the call of its denoiser is kept: prompt embeddings,
pooled embeddings, sizes, masks, whatever the family has. Tensors with a row for each picture become
`Conditions`, which are stored and batched; all the rest is the `CallForm`, the same for every prompt. So text
encoders run once a prompt, and objectives need to know no family.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.intercept import StepCall, StepInterceptor, current_scheduler, intercept_step
from diffplug.network.denoiser import denoisers
from diffplug.watch import quiet

__all__ = [
    "CallForm",
    "Conditions",
    "embeds_guidance",
    "encode",
    "null_condition",
    "one_denoiser",
    "with_embedded_guidance",
]


@dataclass(frozen=True)
class Conditions:
    """Tensors [n, ...] by place in the denoiser's arguments, as "added_cond_kwargs/text_embeds"."""

    leaves: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.leaves.values()))) if self.leaves else 0

    def __getitem__(self, rows: Any) -> Conditions:
        return Conditions({name: value[rows] for name, value in self.leaves.items()})

    def to(self, device: Any, dtype: torch.dtype | None = None) -> Conditions:
        """Return them on a device; `dtype` is for floating-point leaves."""
        return Conditions(
            {n: v.to(device, dtype if v.is_floating_point() else None) for n, v in self.leaves.items()}
        )

    def expand(self, n: int) -> Conditions:
        """Return the one row n times."""
        return Conditions({name: v.expand(n, *v.shape[1:]) for name, v in self.leaves.items()})

    def replaced(self, mask: Tensor, other: Conditions) -> Conditions:
        """Return them with the one row of `other` where a mask [n] says so, in leaves of its shape."""
        leaves = {}
        for name, value in self.leaves.items():
            row = other.leaves[name].to(value)
            where = mask.to(value.device).view(-1, *(1,) * (value.ndim - 1))
            fits = row.shape[1:] == value.shape[1:]
            leaves[name] = torch.where(where, row.expand_as(value), value) if fits else value
        return Conditions(leaves)

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Return parts put together, row after row."""
        try:
            names = parts[0].leaves
            return Conditions({name: torch.cat([part.leaves[name] for part in parts]) for name in names})
        except RuntimeError as error:
            raise ValueError(
                "prompts of this pipeline have embeddings of different lengths, which cannot be batched: "
                "give its call a fixed max_sequence_length"
            ) from error


@dataclass(frozen=True)
class CallForm:
    """How a pipeline calls its denoiser.

    sample, time: names of the two arguments that change. time_scale: what the network is told, divided by the
    scheduler's timestep (FLUX: 1/1000). sign: -1 where the pipeline negates the output. fixed: every argument
    that is the same for all prompts, nested as in the call. row_leaves: places of `Conditions`.
    """

    sample: str
    time: str
    time_scale: float
    sign: float
    shape: tuple[int, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    row_leaves: tuple[str, ...] = ()

    def arguments(self, x: Tensor, told: Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return the denoiser's keyword arguments for states x [n, ...] at timesteps `told` [n]."""
        kwargs = _moved(self.fixed, x.device)
        for place, value in conditions.leaves.items():
            *path, last = place.split("/")
            table = kwargs
            for name in path:
                table = table.setdefault(name, {})
            table[last] = value
        return {**kwargs, self.sample: x, self.time: told * self.time_scale}


def encode(
    pipe: Any, prompts: Sequence[str], *, call: Mapping[str, Any] | None = None, max_rows: int = 64
) -> tuple[CallForm, Conditions]:
    """Return how `pipe` calls its denoiser without guidance, and the conditions of n prompts, on the CPU.

    call: further arguments of the pipeline (height, max_sequence_length, ...). Costs one network evaluation
    for each `max_rows` prompts. Raises ValueError for pipelines with two denoisers, and for those that do
    something else with the network's output than hand it to the scheduler.
    """
    off = _unguided(pipe, prompts[0], call or {})
    form, first = _form(_first_call(pipe, prompts[:1], {**(call or {}), **off}), rows=1)
    parts = [first]
    for begin in range(1, len(prompts), max_rows):
        seen = _first_call(pipe, prompts[begin : begin + max_rows], {**(call or {}), **off})
        parts.append(Conditions(dict(_rows_of(seen.arguments, form))))
    return form, Conditions.cat(parts)


def null_condition(pipe: Any, form: CallForm, *, call: Mapping[str, Any] | None = None) -> Conditions:
    """Return the condition of the unguided half of a guided call, one row.

    Raises ValueError for a teacher without classifier-free guidance, and for pipelines that guide by a second
    call.
    """
    seen = _first_call(pipe, ["a"], {**(call or {}), **_scale(pipe, 7.0)})
    if seen.rows != 2:
        raise ValueError(
            f"{type(pipe).__name__} gives its network no unconditional row, so that there is no guidance to "
            "distil from it: set guidance to 1, or match stored trajectories (diffplug train trajectory)"
        )
    return Conditions(dict(_rows_of(seen.arguments, form)))[:1]


@dataclass
class _Seen:
    """The first call of a denoiser, its output, and what the scheduler was then told."""

    arguments: dict[str, Any]
    sample: str
    time: str
    output: Tensor
    step: StepCall

    @property
    def rows(self) -> int:
        return len(self.arguments[self.sample])


class _Enough(Exception):
    """Ends the run of a pipeline."""


class _Stop(StepInterceptor):
    call: StepCall

    def on_step(self, call: StepCall) -> Any:
        self.call = call
        raise _Enough


def one_denoiser(pipe: Any) -> nn.Module:
    """Return the denoiser of a pipeline; ValueError where it has two."""
    found = denoisers(pipe)
    if len(found) > 1:
        raise ValueError(f"{type(pipe).__name__} has {len(found)} denoisers: training is for one of them")
    module: nn.Module = found[0]
    return module


def embeds_guidance(pipe: Any) -> bool:
    """Whether the denoiser is told the guidance scale as an input (FLUX.1-dev, SANA-Sprint)."""
    takes = "guidance_scale" in inspect.signature(pipe.__call__).parameters
    return takes and bool(getattr(one_denoiser(pipe).config, "guidance_embeds", False))


def with_embedded_guidance(
    pipe: Any, call: Mapping[str, Any] | None, scale: float | None = None
) -> dict[str, Any]:
    """Return the arguments of a call, with the guidance scale that the denoiser is told where it is told one.

    scale: None for that of `call`, and without one the pipeline's default.
    """
    told = dict(call or {})
    if embeds_guidance(pipe):
        default = inspect.signature(pipe.__call__).parameters["guidance_scale"].default
        told["guidance_scale"] = float(told.get("guidance_scale", default) if scale is None else scale)
    return told


def _first_call(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> _Seen:
    denoiser = one_denoiser(pipe)
    kept: list[tuple[dict[str, Any], Tensor]] = []

    def after(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        inner = bound.pop("kwargs", {})
        kept.append(({k: v for k, v in {**bound, **inner}.items() if k != "self"}, out[0]))

    stop = _Stop()
    undo = intercept_step(current_scheduler(pipe), stop)
    hook = denoiser.register_forward_hook(after, with_kwargs=True)
    known = inspect.signature(pipe.__call__).parameters
    told = {"prompt": list(prompts)} if "prompt" in known else {"batch_size": len(prompts)}
    try:
        with quiet(pipe), torch.no_grad():
            pipe(**told, num_inference_steps=2, output_type="latent", **call)
    except _Enough:
        pass
    finally:
        undo()
        hook.remove()
    arguments, output = kept[0]
    sample, time = next(iter(arguments)), next(name for name in arguments if "timestep" in name)
    return _Seen(arguments, sample, time, output, stop.call)


def _unguided(pipe: Any, prompt: str, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the argument that leaves one row a picture: guidance 1, or 0 where 1 already guides."""
    if "guidance_scale" in call or embeds_guidance(pipe):
        return {}
    for scale in (1.0, 0.0):
        off = _scale(pipe, scale)
        if not off or _first_call(pipe, [prompt], {**call, **off}).rows == 1:
            return off
    raise ValueError(f"{type(pipe).__name__} cannot be run without guidance: it takes no guidance_scale <= 1")


def _scale(pipe: Any, scale: float) -> dict[str, Any]:
    return (
        {"guidance_scale": scale} if "guidance_scale" in inspect.signature(pipe.__call__).parameters else {}
    )


def _form(seen: _Seen, rows: int) -> tuple[CallForm, Conditions]:
    step, output = seen.step, seen.output
    sign = _sign(output, step.model_output)
    told, timestep = seen.arguments[seen.time], float(torch.as_tensor(step.timestep).flatten()[0])
    scale = float(torch.as_tensor(told).flatten()[0]) / timestep if timestep else 1.0
    fixed: dict[str, Any] = {}
    leaves: dict[str, Tensor] = {}
    for place, value in _walk({k: v for k, v in seen.arguments.items() if k not in (seen.sample, seen.time)}):
        is_row = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
        if is_row:
            leaves[place] = value.detach().cpu()
            continue
        *path, last = place.split("/")
        table = fixed
        for name in path:
            table = table.setdefault(name, {})
        table[last] = value.detach().cpu() if isinstance(value, Tensor) else value
    fixed["return_dict"] = False
    shape = tuple(seen.arguments[seen.sample].shape[1:])
    form = CallForm(seen.sample, seen.time, _round(scale), sign, shape, fixed, tuple(leaves))
    return form, Conditions(leaves)


def _round(scale: float) -> float:
    """Return 1 or 1/1000 for a scale that is nearly so."""
    return next((value for value in (1.0, 1e-3) if abs(scale / value - 1) < 1e-3), scale)


def _sign(output: Tensor, told: Tensor) -> float:
    """Return what a pipeline multiplies its network's output with: 1 or -1."""
    own = output[:, : told.shape[1]] if output.ndim > 1 and output.shape[1] == 2 * told.shape[1] else output
    if own.shape == told.shape:
        for sign in (1.0, -1.0):
            if torch.allclose(own.float() * sign, told.float(), rtol=1e-3, atol=1e-3):
                return sign
    raise ValueError(
        "this pipeline changes the network's output before its scheduler sees it: it cannot be trained here"
    )


def _rows_of(arguments: Mapping[str, Any], form: CallForm) -> Iterator[tuple[str, Tensor]]:
    for place, value in _walk(arguments):
        if place in form.row_leaves:
            yield place, value.detach().cpu()


def _walk(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{where}{name}/")
        else:
            yield f"{where}{name}", value


def _moved(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _moved(v, device) if isinstance(v, dict) else v.to(device) if isinstance(v, Tensor) else v
        for name, v in values.items()
    }
