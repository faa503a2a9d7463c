"""Exact properties of negative prompts that several methods share, and what a run may not change midway."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from negative_pipelines import apart, drawn, plain
from torch.nn import functional as F

from benchmarks.negative_toy.grid import cases, exact, guided, path_of
from diffplug import plug
from diffplug.samplers.negative.classifier_free import ClassifierFree
from diffplug.samplers.negative.cross_attention import cross_attentions
from diffplug.samplers.negative.guidance import NegativeGuidance
from diffplug.samplers.negative.nag import NAG
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter
from diffplug.samplers.negative.sun_file import load_adapter
from diffplug.testing import tiny
from diffplug.training.noise_path import NoisePath

OTHER, THIRD = "blue square", "green star"


def adapter(pipe: Any, layout: str) -> SunAdapter:
    """Return one that does something, at random."""
    made = SunAdapter.beside(pipe.unet, AdapterMeta(layout=layout))
    generator = torch.Generator().manual_seed(1)
    for value in made.parameters():
        value.data.normal_(std=0.2, generator=generator)
    return made.requires_grad_(False)


ACT = {
    "cfg": lambda pipe: NegativeGuidance("cfg"),
    "interval": lambda pipe: NegativeGuidance("interval"),
    "nag": lambda pipe: NegativeGuidance("nag"),
    "tied": lambda pipe: SpeedUpNet(adapter(pipe, "large")),
    "small": lambda pipe: SpeedUpNet(adapter(pipe, "small")),
    "released": lambda pipe: SpeedUpNet(adapter(pipe, "v1")),
}
IDLE = {
    "cfg": lambda pipe: NegativeGuidance("cfg", strength=0.0),
    "nag": lambda pipe: NAG(alpha=0.0),
    "tied": lambda pipe: SpeedUpNet(adapter(pipe, "large"), strength=0.0),
}


@pytest.mark.law
@pytest.mark.pipe
@pytest.mark.parametrize("name", ACT)
def test_another_negative_prompt_is_another_picture_with_every_method(name: str) -> None:
    pipe = tiny("sd15")
    with plug(pipe, ACT[name](pipe)):
        one, other, again = (drawn(pipe, "sd15", negative_prompt=text) for text in (OTHER, THIRD, OTHER))
    assert apart(one, other) > 1e-4 and torch.equal(one, again)


@pytest.mark.law
@pytest.mark.pipe
@pytest.mark.filterwarnings("ignore:.*does nothing")
@pytest.mark.parametrize("name", IDLE)
def test_what_is_off_draws_one_picture_for_all_negative_prompts(name: str) -> None:
    pipe = tiny("sd15")
    with plug(pipe, IDLE[name](pipe)):
        one, other = (drawn(pipe, "sd15", negative_prompt=text) for text in (OTHER, THIRD))
    assert apart(one, other) < 1e-5 and apart(one, plain(pipe, "sd15")) < 1e-5


@pytest.mark.law
@pytest.mark.pipe
@pytest.mark.parametrize("layout", ["large", "small"])
def test_a_controlnet_with_an_idle_adapter_draws_the_plain_pictures(layout: str) -> None:
    """Two pictures a prompt; the negative prompt, were it shown to the ControlNet, would change them."""
    pipe = tiny("controlnet")

    def made(**told: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in (0, 1)]
        return drawn(pipe, "controlnet", num_images_per_prompt=2, generator=seeds, **told)

    base = made(guidance_scale=0.0)
    idle = SpeedUpNet(adapter(pipe, layout), strength=0.0)
    with plug(pipe, idle), pytest.warns(UserWarning, match="negative prompt does nothing"):
        assert torch.equal(made(negative_prompt=OTHER), base)
    with plug(pipe, SpeedUpNet(adapter(pipe, layout))):
        assert apart(made(negative_prompt=OTHER), base) > 1e-4


class Concatenated:
    """An attention processor that is given both prompts in one sequence, as the method is published."""

    def __init__(self, layer: Any, tokens: int) -> None:
        self.layer, self.tokens = layer, tokens

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **told: Any) -> Any:
        positive, negative = encoder_hidden_states[:, : self.tokens], encoder_hidden_states[:, self.tokens :]
        query = attn.to_q(hidden_states)

        def attended(to_k: Any, to_v: Any, text: Any) -> Any:
            q, k, v = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, to_k(text), to_v(text))
            )
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        own = attended(attn.to_k, attn.to_v, positive)
        z = own
        for branch, text, sign in ((self.layer.negative, negative, -1), (self.layer.positive, positive, 1)):
            other = attended(branch.to_k, branch.to_v, text)
            sizes = [x.flatten(1).norm(dim=1).view(-1, 1, 1) for x in (own, other)]
            z = z + sign * (branch.alpha * other * sizes[0] / sizes[1] + branch.beta)
        return attn.to_out[1](attn.to_out[0](z)) / attn.rescale_output_factor


@pytest.mark.law
def test_both_prompts_in_one_sequence_give_the_same_output_as_hooks() -> None:
    """The published way hands the network c+ and c- as one text; ours shows it c+ alone."""
    pipe = tiny("sd15")
    made = adapter(pipe, "v1")
    with plug(pipe, SpeedUpNet(made)):
        ours = drawn(pipe, "sd15", negative_prompt=OTHER)
    prompt = tiny.inputs("sd15")["prompt"]
    positive, negative = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (prompt, OTHER))
    for name, layer in made.named_layers().items():
        cross_attentions(pipe.unet)[name].set_processor(Concatenated(layer, positive.shape[1]))
    both = torch.cat([positive, negative], 1)
    theirs = drawn(pipe, "sd15", prompt=None, prompt_embeds=both, guidance_scale=0.0)
    assert apart(ours, theirs) < 1e-4 * float(theirs.abs().max())
    assert apart(ours, plain(tiny("sd15"), "sd15")) > 1e-3


@pytest.mark.law
def test_the_public_numbers_stand_for_the_layers_of_stable_diffusion(tmp_path: Path) -> None:
    """Widths alone would let the middle block pass for up_blocks.1: each layer has values of its own."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    # the real one with narrow blocks: the same names and order
    sizes = {"block_out_channels": (8, 16, 32, 32), "cross_attention_dim": 12, "norm_num_groups": 4}
    unet = UNet2DConditionModel(**sizes, attention_head_dim=4)
    table = {
        1: ("down_blocks.0.attentions.0", 8), 3: ("down_blocks.0.attentions.1", 8),
        5: ("down_blocks.1.attentions.0", 16), 7: ("down_blocks.1.attentions.1", 16),
        9: ("down_blocks.2.attentions.0", 32), 11: ("down_blocks.2.attentions.1", 32),
        13: ("up_blocks.1.attentions.0", 32), 15: ("up_blocks.1.attentions.1", 32),
        17: ("up_blocks.1.attentions.2", 32), 19: ("up_blocks.2.attentions.0", 16),
        21: ("up_blocks.2.attentions.1", 16), 23: ("up_blocks.2.attentions.2", 16),
        25: ("up_blocks.3.attentions.0", 8), 27: ("up_blocks.3.attentions.1", 8),
        29: ("up_blocks.3.attentions.2", 8), 31: ("mid_block.attentions.0", 32),
    }  # fmt: skip
    tensors = {}
    for number, (_, width) in table.items():
        for kind in ("neg", "extra_pos"):
            for own in ("k", "v"):
                tensors[f"{number}.to_{own}_{kind}.weight"] = torch.full((width, 12), float(number))
            for own in ("alpha", "beta"):
                tensors[f"{number}.to_k_{kind}_{own}"] = torch.full((width,), float(number))
    assert len(tensors) == 128
    save_file(tensors, tmp_path / "sun.safetensors")
    layers = load_adapter(tmp_path / "sun.safetensors", unet).named_layers()
    assert len(layers) == 16
    for number, (name, width) in table.items():
        layer = layers[f"{name}.transformer_blocks.0.attn2"]
        assert layer.negative.to_v.weight.shape == (width, 12)
        assert {float(value.unique()) for value in layer.parameters()} == {float(number)}


@pytest.mark.law
@pytest.mark.parametrize("w", [0.0, 1.0, 2.0, 7.5])
def test_guidance_is_one_model_whatever_the_network_predicts(w: float) -> None:
    positive, negative, noise = cases(64)
    index = torch.randint(20, 1000, (64,), generator=torch.Generator().manual_seed(0)).double()
    found = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        path = path_of(kind)
        said = guided(*(exact(noise.double(), index, c, path) for c in (positive, negative)), w)
        found[kind] = path.predict(said, noise.double(), index).x0
    flow = NoisePath.of(FlowMatchEulerDiscreteScheduler())
    alpha, sigma = path_of().levels(index)
    at = torch.tensor([flow.index_of(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)])
    x = noise.double() / (alpha + sigma)[:, None]
    said = guided(*(exact(x, at.double(), c, flow) for c in (positive, negative)), w)
    found["flow_prediction"] = flow.predict(said, x, at.double()).x0
    alone = {1.0: positive, 0.0: negative}.get(w)
    for kind, x0 in found.items():
        assert torch.allclose(x0, found["epsilon"], atol=1e-6), kind
        if alone is not None:
            own = path_of().predict(exact(noise.double(), index, alone, path_of()), noise.double(), index)
            assert torch.allclose(x0, own.x0, atol=1e-6)


@pytest.mark.law
def test_the_x0_of_a_whole_segment_lands_where_the_flow_ends() -> None:
    """A Gaussian's flow in closed form: x_u / std_u = x_s / std_s; one step with
    x0~ = (x* - (sigma_u / sigma_s) x) / (alpha_u - (sigma_u / sigma_s) alpha_s) lands on x*."""
    path, spread = path_of(), 0.7
    index = torch.tensor([1000.0, 750, 500, 250, 0])
    alpha, sigma = path.levels(index)
    std = (alpha * spread) ** 2 + sigma**2
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for s, u in pairwise(range(5)):
        landing = x * (std[u] / std[s]).sqrt()
        ratio = sigma[u] / sigma[s]
        bracket = alpha[u] - ratio * alpha[s]
        assert bracket > 0
        x0 = (landing - ratio * x) / bracket
        here, there = (torch.full((5,), float(index[i]), dtype=torch.float64) for i in (s, u))
        output = (x - alpha[s] * x0) / sigma[s]
        assert torch.allclose(path.jump(path.predict(output, x, here), there), landing, atol=1e-9)
        steps = torch.linspace(float(index[s]), float(index[u]), 126).round().double()
        walked = x
        for a, b in pairwise(steps):
            level, power = path.levels(a[None]), 0.0
            power = float((level[0] * spread) ** 2 + level[1] ** 2)
            eps = float(level[1]) * walked / power
            row = torch.full((5,), float(a), dtype=torch.float64)
            walked = path.jump(
                path.predict(eps, walked, row), torch.full((5,), float(b), dtype=torch.float64)
            )
        assert F.mse_loss(walked, landing).sqrt() < 0.02


@pytest.mark.pipe
@pytest.mark.parametrize("method", ["interval", "nag", "tied"])
def test_another_scheduler_in_the_middle_of_a_run_is_refused(method: str) -> None:
    pipe = tiny("sd15")

    def swapped(pipe: Any, i: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
        if i == 0:
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            pipe.scheduler.set_timesteps(3)
        return {}

    own = pipe.scheduler
    with plug(pipe, ACT[method](pipe)):
        with pytest.raises(ValueError, match=r"changed from .* to DPMSolver\w+ in the middle of a run"):
            drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=3, callback_on_step_end=swapped)
        pipe.scheduler = own
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=3)


@pytest.mark.pipe
def test_in_joint_attention_too() -> None:
    pipe = tiny("sd3")

    def swapped(pipe: Any, i: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        return {}

    with plug(pipe, NAG(until=0.0)), pytest.raises(ValueError, match="in the middle of a run"):
        drawn(pipe, "sd3", negative_prompt=OTHER, num_inference_steps=3, callback_on_step_end=swapped)


@pytest.mark.pipe
def test_a_scheduler_that_comes_later_keeps_its_interval() -> None:
    """Between calls a scheduler may change; the part of the run is counted in the new one's steps."""
    pipe = tiny("sd15")
    with plug(pipe, ClassifierFree(interval=(0.0, 0.5))):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        rows: list[int] = []
        pipe.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=4)
    assert rows == [2, 2, 1, 1]


@pytest.mark.pipe
@pytest.mark.parametrize("method", ["nag", "tied", "released"])
def test_guidance_that_comes_on_in_the_middle_of_a_run_is_refused(method: str) -> None:
    pipe = tiny("sd15")

    def guide(pipe: Any, i: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return {}

    with (
        plug(pipe, ACT[method](pipe)),
        pytest.raises(ValueError, match="guide twice: leave guidance_scale out"),
    ):
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=3, callback_on_step_end=guide)
