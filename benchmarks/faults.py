"""Faults that were found by trying the package, each run again: what happened then, and what happens now.

    python -m benchmarks.faults [--only A1 A5] [--json faults.json]

A row is a function of `FAULTS` that returns what happens now in a few words; `was` is what it did when the
fault was found. Others append their own with `@fault`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffplug.testing import tiny

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Fault:
    """A reproduction: its number on the sheet, what it did, and a function that says what it does."""

    name: str
    was: str
    run: Callable[[], str]


FAULTS: list[Fault] = []


def fault(name: str, was: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """A decorator that adds a reproduction to the table."""

    def add(run: Callable[[], str]) -> Callable[[], str]:
        FAULTS.append(Fault(name, was, run))
        return run

    return add


def said(run: Callable[[], Any], done: str = "ran") -> str:
    """What a call's error says, or `done`."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return done


def call(name: str, pipe: Any, *plugs: Any, **options: Any) -> torch.Tensor:
    """The latents of a tiny pipeline's call with these plugs."""
    from diffplug import plug

    start = torch.Generator().manual_seed(0)
    with plug(pipe, *plugs):
        given = tiny.inputs(name, **{"output_type": "latent", "generator": start, **options})
        return torch.as_tensor(pipe(**{k: v for k, v in given.items() if v is not None})[0])


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@fault("A1 flow grid", "told 157407, 6281, 251, 10 for use_exponential_sigmas")
def flow_grid() -> str:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from diffplug.samplers import Solver

    pipe = tiny("sd3")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_exponential_sigmas=True)
    own, ours = pipe.scheduler, Solver(solver="ddim").scheduler_for(pipe)
    for each in (own, ours):
        each.set_timesteps(4)
    same = torch.allclose(own.timesteps, ours.timesteps, rtol=1e-5)
    return f"told {', '.join(f'{t:.0f}' for t in ours.timesteps)}, its own: {same}"


@fault("A2 given sigmas", "28 evaluations at 1, .977, .954, ... for sigmas of 4")
def given_sigmas() -> str:
    from diffplug.samplers import Solver

    pipe, seen = tiny("flux"), []
    pipe.transformer.register_forward_pre_hook(
        lambda m, a, k: seen.append(round(float(k["timestep"][0]), 3)), with_kwargs=True
    )
    call("flux", pipe, Solver(solver="ddim"), sigmas=[1.0, 0.9, 0.6, 0.2], num_inference_steps=None)
    return f"{len(seen)} evaluations at {seen}"


@fault("A3 continuous model", "told 999, 992, 222, 0")
def continuous() -> str:
    from diffplug.samplers import Solver

    return said(lambda: call("svd", tiny("svd"), Solver(solver="dpm++")))


@fault("A3 same, a stock class", "attached, told 999, ...")
def continuous_stock() -> str:
    from diffusers import DPMSolverMultistepScheduler

    return said(lambda: call("svd", tiny("svd"), DPMSolverMultistepScheduler))


@fault("A4 compiled network", "ValueError: the schedule ... belong to another model")
def compiled() -> str:
    from diffplug.samplers import Solver, presets
    from diffplug.samplers.fingerprint import architecture, fingerprint

    pipe = tiny("sd15")
    meta = {"model": fingerprint(pipe), "architecture": architecture(pipe), "steps": 2}
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return said(lambda: call("sd15", pipe, Solver(replace(presets.ddim(2), meta=meta))))


@fault("A4 quantised network", "AttributeError: 'tuple' object has no attribute 'detach'")
def quantised() -> str:
    from diffplug.samplers.fingerprint import architecture, fingerprint

    pipe = tiny("sd15")
    before = architecture(pipe)
    linear = {torch.nn.Linear}
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, linear, dtype=torch.qint8)
    return said(lambda: fingerprint(pipe), f"fingerprint, same architecture: {architecture(pipe) == before}")


@fault("A5 copies", "deepcopy at guidance 7.5: the grid of 1.5, [999, 687, 146, 0]")
def copies() -> str:
    from diffplug import plug
    from diffplug.samplers import Solver, presets

    low, high = (
        replace(presets.ddim(4, grid), meta={"guidance_scale": scale})
        for grid, scale in (("karras", 1.5), ("trailing", 7.5))
    )
    pipe = tiny("sd15")
    with plug(pipe, Solver([low, high])):
        pipe(**tiny.inputs("sd15", num_inference_steps=4, guidance_scale=1.5))
        other = copy.deepcopy(pipe)
        other(**tiny.inputs("sd15", num_inference_steps=4, guidance_scale=7.5))
    return f"{[round(float(t)) for t in other.scheduler.timesteps]}"


@fault("A6 last step of no length", "ValueError: step 14: lambda goes from 3.5347 on by 0")
def no_length() -> str:
    from diffusers import DPMSolverMultistepScheduler

    from diffplug.samplers import Solver

    pipe = tiny("sd15")
    ends = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    pipe.scheduler = DPMSolverMultistepScheduler(**BETAS, **ends)
    own, ours = (call("sd15", pipe, *p, num_inference_steps=15) for p in ([], [Solver(solver="dpm++")]))
    return f"ran, off its own by {off(ours, own):.1e}"


@fault("A8 idle option", "Solver(solver='dpm++', solver_order=3) ran order 2")
def idle_option() -> str:
    from diffplug.samplers import Solver

    return said(lambda: Solver(solver="dpm++", solver_order=3))


@fault("A8 order of its own", "off the pipeline's own DPM-Solver++(3M) by 1e-2")
def own_order() -> str:
    from diffusers import DPMSolverMultistepScheduler

    from diffplug.samplers import Solver

    pipe = tiny("sd15")
    pipe.scheduler = DPMSolverMultistepScheduler(**BETAS, solver_order=3)
    own, ours = (call("sd15", pipe, *p, num_inference_steps=6) for p in ([], [Solver(solver="dpm++")]))
    return f"off by {off(ours, own):.1e}"


@fault("A9 dpm++-sde on a flow", "ValueError: DPMSolverMultistepScheduler is for noise prediction")
def sde_on_flow() -> str:
    from diffplug.registry import sampler

    pipe = tiny("flux")
    return said(lambda: call("flux", pipe, sampler("dpm++-sde", pipe), num_inference_steps=4))


@fault("A9 pndm, 3 steps", "operands could not be broadcast together")
def pndm() -> str:
    from diffplug.registry import sampler

    pipe = tiny("sdxl")
    return said(lambda: call("sdxl", pipe, sampler("pndm", pipe), num_inference_steps=3))


@fault("A10 DeepFloyd IF", "AttributeError: no attribute 'variance_type'")
def learned_variance() -> str:
    from diffplug.samplers import Solver

    return said(lambda: call("deepfloyd-if", tiny("deepfloyd-if"), Solver(solver="dpm++")))


@fault("A10 DDIMPipeline", "TypeError: step() got an unexpected keyword argument 'eta'")
def ddim_pipeline() -> str:
    from diffplug.samplers import DCSolver

    return said(lambda: call("ddim", tiny("ddim"), DCSolver(), output_type="np"))


@fault("P1 before a run", "AttributeError: _hidden")
def before_a_run() -> str:
    from diffplug.samplers import SolverScheduler

    return said(lambda: SolverScheduler().scale_model_input(torch.zeros(1), 0), "the sample")


@fault("17 two threads", "the second thread's pictures were those of a plug it never saw")
def two_threads() -> str:
    import threading

    from diffplug import plug
    from diffplug.samplers import Solver

    pipe, found = tiny("sd15"), []
    with plug(pipe, Solver()):
        thread = threading.Thread(target=lambda: found.append(said(lambda: pipe(**tiny.inputs("sd15")))))
        thread.start()
        thread.join()
    return found[0]


def _reading(name: str, content: bytes, read: Callable[[Path], Any]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return said(lambda: read(path)).replace(folder, "")


@fault("11 deep JSON", "RecursionError")
def deep_json() -> str:
    from diffplug.samplers import DCSolver

    return _reading("n.json", b"[" * 3000, DCSolver)


@fault("11 400 digits", "OverflowError")
def many_digits() -> str:
    from diffplug.samplers import DCSolver

    return _reading("r.json", b"[1, 1, 1, 1" + b"0" * 400 + b"]", DCSolver)


@fault("11 a text as USF", "IndexError")
def text_as_usf() -> str:
    from diffplug.samplers.usf import load_usf

    return _reading("p.txt", b"a red circle\n", lambda path: load_usf(path, "edm"))


@fault("15 a list of 50 MB", "no answer after 120 s")
def large_list() -> str:
    from diffplug.samplers import DCSolver

    return _reading("big.json", b"[" + b"1.0, " * 10_000_000 + b"1.0]", DCSolver)


@fault("19 a long key", "5 MB of message")
def long_key() -> str:
    from diffplug.samplers import SolverSchedule, presets

    document = {**presets.ddim(1).to_json(), "k" * 5_000_000: 1}
    try:
        SolverSchedule.from_json(document)
    except ValueError as error:
        return f"{len(str(error))} characters"
    return "accepted"


@fault("23 a flipped bit in statistics", "loaded")
def flipped_bit() -> str:
    import numpy as np

    from diffplug.samplers import ModelStatistics

    numbers = np.ones(20)
    made = ModelStatistics(lambdas=np.linspace(-1, 1, 20), l=numbers, s=numbers, b=numbers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        made.save(path)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(bytes(data))
        return said(lambda: ModelStatistics.load(path), "loaded").replace(folder, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose names begin so")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    told = parser.parse_args()
    rows = []
    for one in FAULTS:
        if one.name.startswith(tuple(told.only)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rows.append({"fault": one.name, "was": one.was, "is": said_of(one)})
            print("{fault:30} | {was:66} | {is}".format(**rows[-1]), flush=True)
    if told.json:
        told.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def said_of(one: Fault) -> str:
    """What a reproduction finds, or the error that ends it."""
    try:
        return one.run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"


if __name__ == "__main__":
    main()
