"""Solver schedules from elsewhere, and grids for elsewhere: USF's files, plain lists of timesteps or sigmas.

USF's files (arXiv 2312.07243, the released code) are pickles of torch. They are read by torch's loader for
weights, which knows plain containers, numbers and tensors; anything else in them is refused by its name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffplug.files import read_bytes
from diffplug.foreign_files import LARGEST_ARRAY, damaged, read_array
from diffplug.messages import reason, shown
from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule.nodes import Nodes
from diffplug.samplers.schedule.schedule import SolverSchedule
from diffplug.samplers.schedule.steps import Derivative, Scale, SolverStep, Update
from diffplug.samplers.solver.statistics import ModelStatistics

__all__ = ["export_grid", "load_ems", "load_usf", "usf_schedule"]

FIRST = {"no_afs": "model", "zero_x0": "zero_x0", "average_x0": "mean"}
PARAM = {"noise_prediction": "noise", "data_prediction": "data", "dpmsolver_v3_prediction": "ems"}
SCALES = {
    None: Scale(),
    "dpmsolver-2": Scale("bh2"),
    "unipc-bh2": Scale("bh2"),
    "unipc-bh1": Scale("bh1"),
    "0.5exp": Scale("exp", 0.5),
    "-0.5exp": Scale("exp", -0.5),
}
KEYS = (
    "timesteps",
    "orders",
    "prediction_types",
    "start_points",
    "derivative_types",
    "corrector_types",
    "afs",
)
Lambda = Callable[[float], float]


def load_usf(
    path: str | os.PathLike[str], times: str | NoiseLevels, *, mean: Sequence[float] | None = None
) -> SolverSchedule:
    """Return the schedule in a file of USF; no code in the file is run.

    times: what its timesteps mean: "edm" (sigmas), "vp" (ScoreSDE's continuous time), or the noise levels of
    a model of a thousand steps (guided diffusion, latent and stable diffusion). mean: of the data, one number
    or one for each channel, for files that begin with it ("average_x0").

    Raises ValueError, with the file's name, for anything that is no such schedule.
    """
    document = _load(path)
    try:
        return usf_schedule(document, times, mean=mean)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from error


def usf_schedule(
    document: Any, times: str | NoiseLevels, *, mean: Sequence[float] | None = None
) -> SolverSchedule:
    """Return the schedule of the decisions in such a file: a dict, or a list of it and its score."""
    score = None
    if isinstance(document, (list, tuple)) and len(document) == 2:
        document, score = document
    missing = [key for key in KEYS if not isinstance(document, Mapping) or key not in document]
    if missing:
        raise ValueError(f"this is no solver schedule of USF: it lacks {', '.join(missing)}")
    first = _known("afs", document["afs"], FIRST)
    if first == "mean" and mean is None:
        raise ValueError(
            "the schedule begins with the mean of the data, which is not in the file: give mean="
        )
    if first == "zero_x0" and times == "edm":
        first, mean = "mean", (0.0,)  # x_0 / sigma, which is a data prediction of 0
    skips = document.get("skip_coefficients")
    with _named("its lists"):
        lam = _lambda(times)
        nodes = tuple(lam(float(t)) for t in document["timesteps"])
        scales = None if skips is None else tuple(min(1.0, float(value)) for value in skips)
        found = None if score is None else float(score)
        steps = len(document["orders"])
    return SolverSchedule(
        nodes=Nodes(kind="lambda", values=nodes),
        steps=tuple(_step(i, document) for i in range(steps)),
        first=first,
        mean=tuple(mean) if mean is not None and first == "mean" else None,
        skips=scales,
        meta={"origin": "USF"} | ({} if found is None else {"score": found}),
    )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """A block whose errors of values of a wrong kind or size become a ValueError."""
    try:
        yield
    except (TypeError, OverflowError, RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = (str(error) or "of the wrong kind").splitlines()[0][:200]
        raise ValueError(f"{what} cannot be read ({type(error).__name__}: {reason})") from error


def load_ems(
    folder: str | os.PathLike[str], times: str | NoiseLevels, *, ends: tuple[float, float] | None = None
) -> ModelStatistics:
    """Return the statistics in a folder of DPM-Solver-v3 (arXiv 2310.13268): l.npz and sb.npz.

    times: as in `load_usf`. ends: the folder's smallest and largest time, of which EDM's are sigmas; default:
    those in its name, <smallest>_<largest>_<points>_<pairs>, and 1e-3 and 1 for a model of a thousand steps.
    Nothing in the files is run. Raises ValueError, with the folder's name, for anything else.
    """
    folder = Path(folder)
    try:
        l = _array(folder / "l.npz", "l")  # noqa: E741
        s, b = (_array(folder / "sb.npz", name) for name in ("s", "b"))
        first, last = sorted(map(_lambda(times), ends or _ends(folder.name, times)))
        return ModelStatistics(
            lambdas=np.linspace(first, last, len(l)), l=l, s=s, b=b, told={"origin": "EMS"}
        )
    except ValueError as error:
        raise ValueError(f"{os.fspath(folder)!r}: {error}") from error


def _ends(name: str, times: str | NoiseLevels) -> tuple[float, float]:
    """Return the ends that a folder's name says; ValueError where nothing else could say them."""
    parts = name.split("_")
    with suppress(ValueError):
        if len(parts) == 4:
            return float(parts[0]), float(parts[1])
    if isinstance(times, str):
        example = "(0.002, 80.0) for EDM" if times == "edm" else "(0.001, 1.0)"
        raise ValueError(
            "the folder's name does not say where its times end (<smallest>_<largest>_<points>_<pairs>): "
            f"give ends=, as in {example}, or --ends"
        )
    return 1e-3, 1.0


def _array(path: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    if not path.exists():
        raise ValueError(f"{path.name} is not there: a folder of DPM-Solver-v3 holds l.npz and sb.npz")
    found = read_array(path, f"array {name!r} of DPM-Solver-v3", name)
    with damaged(path, f"array {name!r} of DPM-Solver-v3"):
        return np.asarray(found, dtype=np.float64)


def export_grid(schedule: SolverSchedule, levels: NoiseLevels, kind: str = "sigmas") -> list[float]:
    """Return the nodes of a schedule for programs that take a list: everything else of the solver is lost.

    kind: "sigmas", N + 1 of them with the end, as ComfyUI and k-diffusion take them (sigma / alpha), flow
    models' own; or "timesteps", N of them, as Diffusers' pipelines take them. Evaluations only: the node of
    an analytic first step is left out.
    """
    if kind not in ("sigmas", "timesteps"):
        raise ValueError(f"kind {kind!r}: allowed are sigmas and timesteps")
    hidden = int(schedule.first != "model")
    sigmas = schedule.nodes.sigmas(levels, len(schedule.steps))[hidden:]
    return (sigmas if kind == "sigmas" else levels.time_of_sigma(sigmas[:-1])).tolist()


def _load(path: str | os.PathLike[str]) -> Any:
    """Return the objects in a pickle of torch, if they are plain ones."""
    if not Path(path).exists():
        raise ValueError(f"{os.fspath(path)!r}: the file does not exist")
    data = io.BytesIO(read_bytes(path, limit=LARGEST_ARRAY))
    with torch.serialization.safe_globals(_plain_numpy()):
        try:
            return torch.load(data, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            named = str(error).partition("GLOBAL ")[2].partition(" ")[0]
            what = f"it holds {named}, which may run code" if named else "it is no pickle of plain values"
            raise ValueError(
                f"{os.fspath(path)!r}: {what}: only numbers, texts, lists, dicts and tensors are read"
            ) from error
        except Exception as error:  # of a text or a damaged pickle torch raises nearly anything
            raise ValueError(f"{os.fspath(path)!r}: it is no file of torch ({reason(error)})") from error


def _plain_numpy() -> list[Any]:
    """Return what a number of numpy is made of, under its old name and its new one."""
    scalar = np.float64(0.0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    types = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4")}
    return [*((scalar, name) for name in names), np.dtype, *types]


def _lambda(times: str | NoiseLevels) -> Lambda:
    """Return the function from a timestep of a file to log(alpha / sigma)."""
    if isinstance(times, str):
        return _known("times", times, {"edm": lambda t: -math.log(t), "vp": _continuous})
    if times.table is None:
        raise ValueError("USF has no schedules for flow models: give the noise levels of a VP model")
    logs = -0.5 * np.log1p(np.square(np.asarray(times.table, dtype=np.float64)))
    places = np.arange(len(logs))
    return lambda t: _from_log_alpha(float(np.interp(len(logs) * t - 1, places, logs)))


def _continuous(t: float) -> float:
    """Return lambda of ScoreSDE's VP process: beta from 0.1 to 20."""
    return _from_log_alpha(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)


def _from_log_alpha(log_alpha: float) -> float:
    return log_alpha - 0.5 * math.log(-math.expm1(2 * log_alpha))


def _step(i: int, document: Mapping[str, Any]) -> SolverStep:
    try:
        start, order = int(document["start_points"][i]), int(document["orders"][i])
        predict = _update(order, start, -1, document["derivative_types"][i])
        corrector = document["corrector_types"][i]
        param = _known("prediction type", document["prediction_types"][i], PARAM)
        return SolverStep(param=param, predict=predict, correct=_corrector(corrector))
    except (KeyError, IndexError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"step {i} is incomplete ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise ValueError(f"step {i}: {error}") from None


def _corrector(told: Mapping[str, Any]) -> Update | None:
    if told["type"] == "no_corrector":
        return None
    if told["type"] != "pseudo":
        raise ValueError(f"corrector type {shown(told['type'])}: only 'pseudo' and 'no_corrector' are known")
    return _update(int(told["taylor_order"]), int(told["start_point"]), -2, told["derivative_type"])


def _update(order: int, start: int, newest: int, derivatives: Sequence[Mapping[str, Any]]) -> Update:
    """Return an update; newest: the number of the newest state that it can start from.

    Entries beyond the first order - 1 do not count: USF's own presets have empty ones there.
    """
    made = [Derivative(tuple(int(p) - start for p in sorted(d["active_points"], reverse=True)), _scale(d))
            for d in derivatives[: max(order, 1) - 1]]  # fmt: skip
    return Update(order=order, derivatives=tuple(made), start=start - newest)


def _scale(derivative: Mapping[str, Any]) -> Scale:
    if derivative.get("relaxation") == "linear":
        c = float(derivative.get("relaxation_coefficient") or 0.0)
        return Scale("linear", c) if c else Scale()
    return _known("relaxation", derivative.get("relaxation"), SCALES)


def _known(what: str, value: Any, table: Mapping[Any, Any]) -> Any:
    if not isinstance(value, Hashable) or value not in table:
        raise ValueError(f"{what} {value!r} is unknown: allowed are {', '.join(map(str, table))}")
    return table[value]
