"""Negative prompts together with whatever else people do to a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from negative_pipelines import apart, drawn, plain

from diffplug import plug
from diffplug.intercept import taken_arguments
from diffplug.network.denoiser import count_network
from diffplug.samplers.negative.guidance import NegativeGuidance
from diffplug.samplers.negative.nag import NAG
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter
from diffplug.testing import tiny

OTHER = "blue square"


def nag(pipe: Any) -> Any:
    return NAG()


def tied(pipe: Any) -> Any:
    return SpeedUpNet(_random(pipe, "large"))


def released(pipe: Any) -> Any:
    return SpeedUpNet(_random(pipe, "v1"))


def _random(pipe: Any, layout: str) -> SunAdapter:
    adapter = SunAdapter.beside(getattr(pipe.unet, "_orig_mod", pipe.unet), AdapterMeta(layout=layout))
    generator = torch.Generator().manual_seed(1)
    for value in adapter.parameters():
        value.data.normal_(std=0.2, generator=generator)
    return adapter.requires_grad_(False)


METHODS: list[Callable[[Any], Any]] = [nag, tied, released]
every_method = pytest.mark.parametrize("method", METHODS, ids=["nag", "tied", "released"])


@pytest.mark.pipe
@every_method
@pytest.mark.parametrize("first", [True, False])
def test_steering_multiplies_prompts_and_negatives_alike(method: Callable[[Any], Any], first: bool) -> None:
    from diffplug.steering import BestOfN

    pipe = tiny("sd15")
    reward = _brightness
    prompts, negatives = ["a red circle", "a cross"], [OTHER, "green star"]

    def steered(**told: Any) -> Any:
        steer, guide = BestOfN(reward, particles=2), method(pipe)
        with plug(pipe, *((steer, guide) if first else (guide, steer))), count_network(pipe) as count:
            made = pipe(
                prompts,
                num_inference_steps=2,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
                **told,
            )
        assert count.rows == 2 * 2 * 2
        return made.images

    both = steered(negative_prompt=negatives)
    assert both.shape[0] == 2
    assert apart(both, steered(negative_prompt=negatives[::-1])) > 1e-4


def _brightness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.pipe
@every_method
def test_a_network_in_slices_of_rows_draws_the_same(method: Callable[[Any], Any]) -> None:
    from diffplug.steering.engine.row_slices import sliced_network

    pipe = tiny("sd15")
    told: dict[str, Any] = {
        "prompt": ["a red circle", "a cross", "a star"],
        "negative_prompt": [OTHER, "green star", "yellow"],
    }

    def made() -> torch.Tensor:
        return drawn(pipe, "sd15", **told, generator=[torch.Generator().manual_seed(i) for i in range(3)])

    with plug(pipe, method(pipe)):
        whole = made()
        with sliced_network(pipe, 2):
            sliced = made()
    assert apart(whole, sliced) < 1e-4


@pytest.mark.pipe
@pytest.mark.parametrize("rows", [False, True])
def test_guidance_in_a_part_of_the_run_is_told_by_the_sample_not_by_counting_calls(rows: bool) -> None:
    """The negative call of a step got another window's, or another slice's, positive output."""
    from diffplug.samplers.video import Windows
    from diffplug.steering.engine.row_slices import sliced_network

    pipe = tiny("wan")
    told = tiny.inputs("wan", num_frames=17, output_type="latent", guidance_scale=4.0)
    told |= {"negative_prompt": [OTHER, "yellow"], "prompt": ["a red circle", "a cross"]}

    def made() -> torch.Tensor:
        return pipe(**told, generator=[torch.Generator().manual_seed(i) for i in range(2)]).frames

    windows, interval = Windows(frames=9, overlap=4), NegativeGuidance("interval")
    with plug(pipe, windows, interval):
        whole = made()
        with sliced_network(pipe, 1 if rows else None):
            assert apart(whole, made()) < 1e-4
    with plug(pipe, interval, windows):
        assert apart(whole, made()) < 1e-4


@pytest.mark.pipe
@pytest.mark.parametrize("method", [nag, tied], ids=["nag", "tied"])
def test_windows_of_frames_may_come_before_or_after(method: Callable[[Any], Any]) -> None:
    """AnimateDiff shows its layers a row of text for every frame; a window has fewer."""
    from diffplug.samplers.video import Windows

    pipe = tiny("animatediff")
    told = tiny.inputs("animatediff", num_frames=8, output_type="latent")
    told |= {"negative_prompt": [OTHER, "yellow"], "prompt": ["a red circle", "a cross"]}
    windows, negative = Windows(frames=4, overlap=2), method(pipe)

    def made() -> torch.Tensor:
        return pipe(**told, generator=[torch.Generator().manual_seed(i) for i in range(2)]).frames

    with plug(pipe, negative, windows):
        inside = made()
    with plug(pipe, windows, negative):
        assert apart(made(), inside) < 1e-5


@pytest.mark.pipe
@every_method
def test_a_lora_may_come_before_or_after(method: Callable[[Any], Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    found = []
    for before in (True, False):
        pipe = tiny("sd15")
        guide = method(pipe)
        if before:
            torch.manual_seed(3)
            pipe.unet.add_adapter(config)
        with plug(pipe, guide):
            if not before:
                torch.manual_seed(3)
                pipe.unet.add_adapter(config)
            found.append(drawn(pipe, "sd15", negative_prompt=OTHER))
    assert apart(*found) < 1e-5
    plain_pipe = tiny("sd15")
    with plug(plain_pipe, method(plain_pipe)):
        assert apart(found[0], drawn(plain_pipe, "sd15", negative_prompt=OTHER)) > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("method", "wrapped"), [(nag, False), (tied, True), (released, True)], ids=["nag", "tied", "released"]
)
def test_compiled_networks_draw_the_same(method: Callable[[Any], Any], wrapped: bool) -> None:
    torch.compiler.reset()
    pipe = tiny("sd15")
    guide = method(pipe)
    with plug(pipe, guide):
        eager = drawn(pipe, "sd15", negative_prompt=OTHER)
    base = plain(pipe, "sd15")
    if wrapped:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    assert apart(plain(pipe, "sd15"), base) < 1e-5
    with plug(pipe, guide):
        compiled = drawn(pipe, "sd15", negative_prompt=OTHER)
    assert apart(compiled, eager) < 1e-5
    assert apart(plain(pipe, "sd15"), base) < 1e-5


@pytest.mark.pipe
@pytest.mark.parametrize("method", [nag, tied], ids=["nag", "tied"])
def test_ip_adapter_keeps_its_picture(method: Callable[[Any], Any]) -> None:
    pipe = tiny("sd15")
    picture = _ip_adapter(pipe)
    guide = method(pipe)

    def made(**told: Any) -> torch.Tensor:
        return drawn(pipe, "sd15", ip_adapter_image_embeds=[picture], **told)

    base = made(guidance_scale=0.0)
    with plug(pipe, guide):
        blue, same = made(negative_prompt=OTHER), made(negative_prompt="a red circle")
    assert apart(same, base) < 1e-5 and apart(blue, base) > 1e-4
    pipe.set_ip_adapter_scale(0.0)
    with plug(pipe, guide):
        assert apart(made(negative_prompt=OTHER), blue) > 1e-5  # the picture had acted


def _ip_adapter(pipe: Any) -> torch.Tensor:
    """Give a tiny pipeline an IP-Adapter of random weights; return embeddings of a picture for it."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(4)
    processors: dict[str, Any] = {}
    modules = dict(pipe.unet.named_modules())
    for name, own in pipe.unet.attn_processors.items():
        layer = modules[name.removesuffix(".processor")]
        width = layer.to_q.weight.shape[0]
        processors[name] = (
            IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=32, num_tokens=(4,), scale=[1.0])
            if "attn2" in name
            else own
            if isinstance(own, torch.nn.Module)
            else AttnProcessor2_0()
        )
    pipe.unet.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=32, num_image_text_embeds=4)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    pipe.unet.requires_grad_(False)
    return torch.randn(1, 1, 8)


@pytest.mark.pipe
@every_method
def test_half_precision(method: Callable[[Any], Any]) -> None:
    pipe = tiny("sd15").to(torch.bfloat16)
    with plug(pipe, method(pipe)):
        assert drawn(pipe, "sd15", negative_prompt=OTHER).isfinite().all()


@pytest.mark.pipe
def test_other_plugs_can_see_that_the_negative_prompt_is_taken() -> None:
    pipe = tiny("sd15")
    with plug(pipe, NAG()):
        assert "negative_prompt" in taken_arguments(pipe)
    assert not taken_arguments(pipe)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_few_step_checkpoint_gets_its_negative_prompt_back(name: str) -> None:
    plugs = pytest.importorskip("diffplug.samplers.few_step.plug")
    rows = pytest.importorskip("diffplug.samplers.few_step.catalogue")
    row = rows.Row(
        name="nothing", family=name, kind="pipeline", steps=(4,), scheduler="DDIMScheduler",
        seen={4: (999.0, 749.0, 499.0, 249.0)}, guidance="off", licence="none", source="a test",
    )  # fmt: skip
    pipe = tiny(name)
    with plug(pipe, plugs.FewStep(row, steps=4), guide := NegativeGuidance()), count_network(pipe) as count:
        one = drawn(pipe, name, negative_prompt=OTHER, num_inference_steps=4)
        two = drawn(pipe, name, negative_prompt="green star", num_inference_steps=4)
    assert guide.method == "nag" and count.rows == 8
    assert apart(one, two) > 1e-4
