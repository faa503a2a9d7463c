"""Any family's denoiser, called by the trainer as its pipeline calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug.intercept import StepCall, StepInterceptor, intercept_step
from diffplug.testing import tiny
from diffplug.training.conditions import encode, null_condition, one_denoiser
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath
from diffplug.training.tuners.full import FullTuner

CALLS: dict[str, dict[str, Any]] = {
    "sd3": {"height": 16, "width": 16, "max_sequence_length": 16},
    "flux": {"height": 16, "width": 16, "max_sequence_length": 16},
    "wan": {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16},
    "pixart": {"use_resolution_binning": False, "clean_caption": False},
}


class Noted(StepInterceptor):
    """The first step of a run."""

    first_call: StepCall | None = None

    def on_step(self, call: StepCall) -> Any:
        if self.first_call is None:
            self.first_call = call
        return call.run()


def network(name: str, pipe: Any, prompts: list[str]) -> tuple[Network, Any]:
    form, conditions = encode(pipe, prompts, call=CALLS.get(name))
    tuner = FullTuner()
    tuner.attach(one_denoiser(pipe))
    return Network(one_denoiser(pipe), NoisePath.of(pipe.scheduler), form, tuner), conditions


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "pixart"])
def test_the_network_says_what_the_pipelines_own_call_said(name: str) -> None:
    pipe, prompts = tiny(name), ["a red circle", "a blue square", "a cat"]
    net, conditions = network(name, pipe, prompts)
    assert len(conditions) == 3
    noted = Noted()
    undo = intercept_step(pipe.scheduler, noted)
    off = {} if name == "flux" else {"guidance_scale": 1.0}
    pipe(prompt=prompts, num_inference_steps=2, output_type="latent", **CALLS.get(name, {}), **off)
    undo()
    call = noted.first_call
    assert call is not None
    from diffplug import noise

    here = noise.level(pipe.scheduler, step_index=0)
    x = net.path.standard(call.sample.float(), here.alpha, here.sigma)
    index = torch.full((3,), net.path.index_of(here.alpha, here.sigma))
    with torch.no_grad():
        said = net(x, index, conditions)
    wanted = noise.x0hat(
        pipe.scheduler, call.model_output.float(), call.timestep, call.sample.float(), step_index=0
    )
    # UniPC, which Wan has, tells the network whole timesteps
    assert torch.allclose(said.x0, wanted, atol=0.1 if name == "wan" else 2e-3, rtol=1e-3)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_the_null_condition_is_that_of_a_guided_call(name: str) -> None:
    pipe = tiny(name)
    form, conditions = encode(pipe, ["a red circle"], call=CALLS.get(name))
    null = null_condition(pipe, form, call=CALLS.get(name))
    assert null.leaves.keys() == conditions.leaves.keys()
    if name == "sd15":
        _, empty = encode(pipe, [""])
        assert torch.allclose(null.leaves["encoder_hidden_states"], empty.leaves["encoder_hidden_states"])
    if name == "sdxl":  # its embeddings of no prompt are zeros
        assert not null.leaves["encoder_hidden_states"].any()
        assert not null.leaves["added_cond_kwargs/text_embeds"].any()
        assert null.leaves["added_cond_kwargs/time_ids"].any()


@pytest.mark.pipe
def test_a_teacher_without_guidance_is_refused_where_guidance_is_asked_for() -> None:
    pipe = tiny("flux")
    form, _ = encode(pipe, ["a"], call=CALLS["flux"])
    with pytest.raises(ValueError, match="no unconditional row, so that there is no guidance to distil"):
        null_condition(pipe, form, call=CALLS["flux"])


@pytest.mark.pipe
def test_encoding_leaves_the_pipeline_as_it_was_and_does_not_depend_on_the_batch() -> None:
    pipe = tiny("sd15")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    prompts = [f"prompt {i}" for i in range(5)]
    _, whole = encode(pipe, prompts, max_rows=64)
    _, parts = encode(pipe, prompts, max_rows=2)
    for name, value in whole.leaves.items():
        assert torch.allclose(value, parts.leaves[name], atol=1e-5)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and not pipe.unet._forward_hooks
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())
