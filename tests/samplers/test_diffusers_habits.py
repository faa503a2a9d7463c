"""What people do with Diffusers' schedulers: pickle, compile, differentiate, inpaint, pass to a refiner."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from dc_runs import RATIOS, network, ours, run, sample, start
from diffusers import (
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from diffplug.plug import plug
from diffplug.samplers import CompensationPolynomial, DCSolver, DCSolverScheduler, Solver
from diffplug.samplers.schedule import presets
from diffplug.samplers.search.parameters import with_ratios
from diffplug.testing import tiny

TEN = [1.0, 1.0, *[0.9, 1.1] * 4]


def searched() -> Any:
    plain = presets.unipc(6, final="sigma_min", disable_corrector=(0,))
    return with_ratios(plain, dict(enumerate(RATIOS)))


@pytest.mark.law
def test_a_pickle_in_the_middle_of_a_run_goes_on() -> None:
    scheduler = ours(dc_ratios=RATIOS)
    scheduler.set_timesteps(6)
    x = sample(scheduler, start(), stop=3)
    again = pickle.loads(pickle.dumps(scheduler))  # noqa: S301 - our own bytes
    assert torch.equal(sample(again, x, begin=3), sample(scheduler, x, begin=3))


@pytest.mark.law
@pytest.mark.parametrize(
    "one",
    [
        DCSolver(RATIOS, dc_variable="lambda"),
        DCSolver({(6, 5.0): RATIOS}, elsewhere="neutral"),
        DCSolver(searched()),
        DCSolver(CompensationPolynomial(np.eye(6), (5, 8), (5.0, 5.0))),
        Solver([searched(), presets.ipndm(4)], solver="deis"),
        Solver(),
    ],
    ids=range(6),
)
def test_plugs_are_values_that_can_be_copied_and_sent(one: Any) -> None:
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):  # noqa: S301 - our own bytes
        assert again == one and type(again) is type(one)
        with pytest.raises(AttributeError):
            again.config = {}


@pytest.mark.law
def test_equal_polynomials_are_equal() -> None:
    one, other = (CompensationPolynomial(scale * np.eye(6)) for scale in (1, 2))
    assert one == CompensationPolynomial(np.eye(6)) and one != other
    assert hash(one) == hash(CompensationPolynomial(np.eye(6)))


@pytest.mark.law
def test_a_step_compiles_in_one_graph() -> None:
    """The first that corrects and the first that compensates; each is a graph of its own."""
    scheduler = ours(dc_ratios=RATIOS, disable_corrector=[])
    scheduler.set_timesteps(6)
    wanted = sample(scheduler, start(), stop=3)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)

    def step(output: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scheduler.step(output, t, x, return_dict=False)[0]  # type: ignore[return-value]

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    x = start()
    for i, t in enumerate(scheduler.timesteps[:3]):
        x = compiled(network(x, i), t, x) if i else scheduler.step(network(x, i), t, x).prev_sample
    assert torch.equal(x, wanted)


@pytest.mark.law
def test_gradients_flow_through_a_run() -> None:
    def end(x: torch.Tensor) -> torch.Tensor:
        scheduler = ours(dc_ratios=RATIOS)
        scheduler.set_timesteps(6)
        return sample(scheduler, x).square().sum()

    x, shift = start().requires_grad_(), torch.zeros_like(start())
    (gradient,) = torch.autograd.grad(end(x), x)
    shift[0, 1, 2, 3] = 1e-5
    difference = float(end(start() + shift) - end(start() - shift)) / 2e-5
    assert float(gradient[0, 1, 2, 3]) == pytest.approx(difference, rel=1e-6)


@pytest.mark.law
def test_shapes_devices_and_mixed_precision() -> None:
    for shape in ((1, 4, 3, 4, 4), (1, 7, 16), (0, 4, 4, 4)):
        scheduler = ours(dc_ratios=RATIOS)
        scheduler.set_timesteps(6)
        assert sample(scheduler, torch.randn(shape)).shape == shape
    for device in ("cpu", torch.device("meta")):
        scheduler.set_timesteps(6, device)
        assert scheduler.timesteps.device.type == torch.device(device).type
        assert scheduler.sigmas.device.type == "cpu"
    for dtype in (torch.float16, torch.bfloat16):  # as Wan does: half networks, single latents
        scheduler.set_timesteps(6)
        x = start(torch.float32)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x, i).to(dtype), t, x).prev_sample
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, run(scheduler, torch.float32), rtol=0, atol=0.1)


@pytest.mark.contract
@pytest.mark.parametrize(
    "config",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=["zero-snr", "cosine"],
)
def test_almost_pure_noise_is_unipcs_too(config: dict[str, Any]) -> None:
    fixed = {"final_sigmas_type": "sigma_min", "disable_corrector": [0]}
    wanted = run(UniPCMultistepScheduler(**fixed, **config))
    torch.testing.assert_close(
        run(DCSolverScheduler(**config)), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max())
    )


@pytest.mark.pipe
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_runs(strength: float) -> None:
    parts = tiny("sd15-img2img").components
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    red, everything = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    for plugged in (DCSolver(TEN), Solver(solver="ipndm", grid="log-snr")):
        with plug(pipe, plugged):
            latents = pipe(
                prompt="a", image=red, mask_image=everything, num_inference_steps=10, strength=strength,
                output_type="latent", height=16, width=16,
            ).images  # fmt: skip
        assert bool(torch.as_tensor(latents).isfinite().all())


@pytest.mark.pipe
def test_a_refiner_takes_over_where_the_base_model_stops() -> None:
    """A solver without a history does in two parts what it does in one; others start again, and run."""
    base = tiny("sdxl")
    refiner = StableDiffusionXLImg2ImgPipeline(**base.components)
    refiner.set_progress_bar_config(disable=True)
    call = tiny.inputs("sdxl", num_inference_steps=10, output_type="latent")
    rest = {name: value for name, value in call.items() if name not in ("height", "width")}

    def latents(plugged: Any, pipe: Any, **options: Any) -> torch.Tensor:
        with plug(pipe, plugged):
            return torch.as_tensor(pipe(**options, generator=torch.Generator().manual_seed(0))[0])

    first_order = DCSolver(solver_order=1, disable_corrector=list(range(10)))
    for plugged in (first_order, DCSolver(TEN)):
        half = latents(plugged, base, **call, denoising_end=0.7)
        both = latents(plugged, refiner, **rest, image=half, denoising_start=0.7)
        whole = latents(plugged, base, **call)
        assert bool(both.isfinite().all()) and torch.equal(both, whole) == (plugged is first_order)
