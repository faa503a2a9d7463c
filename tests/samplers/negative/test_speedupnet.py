"""SpeedUpNet: exact where there is nothing to do, one evaluation a step, files, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from negative_pipelines import apart, drawn, plain
from safetensors.torch import load_file, save_file
from video_pipelines import ltx_i2v, picture, wan_ti2v

from diffplug import load, plug
from diffplug.network.denoiser import count_network, denoisers
from diffplug.samplers import FewStep
from diffplug.samplers.negative.cross_attention import cross_attentions
from diffplug.samplers.negative.speedupnet import SpeedUpNet, shipped_adapter
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter, put_on
from diffplug.samplers.negative.sun_file import load_adapter, save_adapter
from diffplug.samplers.negative.sun_layers import LayerShape, ReleasedLayer, TiedLayer, features
from diffplug.testing import tiny

OTHER = "blue square"
FAMILIES = ["sd15", "sdxl", "controlnet", "animatediff", "pixart", "sana", "ltx", "wan"]


def noisy(pipe: Any, layout: str = "large", **meta: Any) -> SunAdapter:
    """An adapter that does something, at random."""
    adapter = SunAdapter.beside(denoisers(pipe)[0], AdapterMeta(layout=layout, **meta))
    generator = torch.Generator().manual_seed(1)
    for value in adapter.parameters():
        value.data.normal_(std=0.2, generator=generator)
    return adapter.requires_grad_(False)


@pytest.mark.law
@pytest.mark.pipe
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["large", "small"])
def test_tied_is_the_base_bit_for_bit_where_there_is_nothing_to_do(name: str, layout: str) -> None:
    pipe = tiny(name)
    base, adapter = plain(pipe, name), noisy(pipe, layout)
    with plug(pipe, SpeedUpNet(adapter)), count_network(pipe) as count:
        acts = drawn(pipe, name, negative_prompt=OTHER)
        assert count.calls == count.rows == 2
        same = drawn(pipe, name, negative_prompt=tiny.inputs(name)["prompt"])
        with pytest.warns(UserWarning, match="negative prompt does nothing"):
            one = drawn(pipe, name, negative_prompt=OTHER, guidance_scale=1.0)
    with plug(pipe, SpeedUpNet(adapter, strength=0.0)):
        off = drawn(pipe, name)
    assert apart(acts, base) > 1e-3
    for run in (same, one, off, plain(pipe, name)):
        assert torch.equal(run, base)


@pytest.mark.pipe
def test_an_untrained_adapter_does_nothing_and_guidance_scale_works() -> None:
    pipe = tiny("sd15")
    with plug(pipe, SpeedUpNet(SunAdapter.beside(pipe.unet))):
        assert torch.equal(drawn(pipe, "sd15", negative_prompt=OTHER), plain(pipe, "sd15"))
    with plug(pipe, SpeedUpNet(noisy(pipe))):
        scales = [drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=w) for w in (2.0, 5.0, 5.0)]
    assert torch.equal(scales[1], scales[2]) and apart(scales[0], scales[1]) > 1e-3
    with plug(pipe, SpeedUpNet(noisy(pipe), guidance_scale=2.0)):
        assert torch.equal(drawn(pipe, "sd15", negative_prompt=OTHER), scales[0])


@pytest.mark.law
def test_with_the_base_s_weights_and_gate_1_a_linear_network_is_guided() -> None:
    base = cross_attentions(tiny("sd15").unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    layer = TiedLayer(LayerShape.of(base))
    layer.copy_base(base)
    torch.nn.init.ones_(layer.gate[2].bias)
    hidden, told = torch.randn(2, 4, 16), features(torch.tensor([3.0, 5.0]), torch.tensor([0.2, 0.9]))
    positive, negative = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    offset = layer(base, hidden, positive, negative, told)
    attended = [base(hidden, encoder_hidden_states=text) for text in (positive, negative)]
    assert apart(offset, attended[0] - attended[1]) < 1e-6


@pytest.mark.law
def test_rows_are_independent_but_for_the_published_norm() -> None:
    shape = LayerShape(16, 16, 32, 2)
    base = cross_attentions(tiny("sd15").unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    hidden, positive, negative = torch.randn(3, 4, 16), torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    told = features(torch.full((3,), 5.0), torch.full((3,), 0.5))
    merged, found = torch.randn(3, 4, 16), {}
    shape = LayerShape.of(base)
    for norm in ("sample", "tensor"):
        torch.manual_seed(0)
        layer = ReleasedLayer(shape, norm=norm)
        all_rows = layer(base, hidden, merged, positive, negative)
        alone = layer(base, hidden[:1], merged[:1], positive[:1], negative[:1])
        found[norm] = (apart(all_rows[:1], alone), alone)
    assert found["sample"][0] < 1e-6 < 1e-3 < found["tensor"][0]
    assert apart(found["sample"][1], found["tensor"][1]) < 1e-6  # one row: the same
    tied = TiedLayer(shape)
    torch.nn.init.normal_(tied.gate[2].weight)
    all_rows = tied(base, hidden, positive, negative, told)
    assert apart(all_rows[:1], tied(base, hidden[:1], positive[:1], negative[:1], told[:1])) < 1e-6


@pytest.mark.law
def test_kept_keys_change_nothing_and_are_forgotten_with_the_weights() -> None:
    base = cross_attentions(tiny("sd15").unet)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    layer = TiedLayer(LayerShape.of(base)).requires_grad_(False)
    torch.nn.init.normal_(layer.gate[2].weight)
    hidden, positive, negative = torch.randn(1, 4, 16), torch.randn(1, 7, 32), torch.randn(1, 7, 32)
    told = features(torch.tensor([5.0]), torch.tensor([0.5]))
    with torch.enable_grad():
        fresh = layer(base, hidden, positive, negative, told)
    with torch.no_grad():
        kept = [layer(base, hidden, positive, negative, told) for _ in range(2)]
        assert all(apart(run, fresh) < 1e-6 for run in kept)
        layer.to_k.weight.mul_(2.0)
        assert apart(layer(base, hidden, positive, negative, told), fresh) > 1e-4


@pytest.mark.pipe
def test_controlnets_see_the_prompt_alone() -> None:
    pipe = tiny("controlnet")
    seen: list[torch.Tensor] = []
    pipe.controlnet.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    plain(pipe, "controlnet", num_images_per_prompt=2)
    with plug(pipe, SpeedUpNet(noisy(pipe))):
        drawn(pipe, "controlnet", num_images_per_prompt=2, negative_prompt=OTHER)
    assert torch.equal(seen[0], seen[-1])


@pytest.mark.pipe
@pytest.mark.parametrize("layout", ["large", "small", "v1"])
def test_files_come_back_as_they_were(layout: str, tmp_path: Path) -> None:
    pipe = tiny("sd15")
    adapter = noisy(pipe, layout, guidance_range=(1.0, 6.0), steps=(4,), figures={"real": 0.5})
    first = save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    again = load_adapter(first, pipe.unet)
    second = save_adapter(again, tmp_path / "b.safetensors", torch.float32)
    assert again.meta == adapter.meta
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with plug(pipe, SpeedUpNet(first)):
        read = drawn(pipe, "sd15", negative_prompt=OTHER)
    with plug(pipe, SpeedUpNet(adapter)):
        assert torch.equal(drawn(pipe, "sd15", negative_prompt=OTHER), read)


def public(pipe: Any, positive: bool = True) -> dict[str, torch.Tensor]:
    """A state dict as the public file has it: numbered among all processors, down, up, middle."""
    processors = list(pipe.unet.attn_processors)
    layers = cross_attentions(pipe.unet)
    tensors = {}
    for number, name in enumerate(processors):
        if "attn2" in name:
            inner, text = layers[name.removesuffix(".processor")].to_k.weight.shape
            generator = torch.Generator().manual_seed(number)
            for kind in ("neg", "extra_pos") if positive else ("neg",):
                for own in ("k", "v"):
                    tensors[f"{number}.to_{own}_{kind}.weight"] = torch.randn(
                        inner, text, generator=generator
                    )
                tensors[f"{number}.to_k_{kind}_alpha"] = torch.randn(inner, generator=generator)
                tensors[f"{number}.to_k_{kind}_beta"] = torch.randn(inner, generator=generator)
    return tensors


@pytest.mark.pipe
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_public_form_is_read_by_its_numbers(positive: bool, suffix: str, tmp_path: Path) -> None:
    pipe, file = tiny("sd15"), tmp_path / f"sun{suffix}"
    tensors = public(pipe, positive)
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    adapter = load_adapter(file, pipe.unet, norm="tensor")
    names = [name.removesuffix(".processor") for name in pipe.unet.attn_processors]
    for name, layer in adapter.named_layers().items():
        assert torch.equal(layer.negative.to_k.weight, tensors[f"{names.index(name)}.to_k_neg.weight"])
        assert layer.norm == "tensor" and (layer.positive is not None) is positive
    with plug(pipe, SpeedUpNet(file)), count_network(pipe) as count:
        acts = drawn(pipe, "sd15", negative_prompt=OTHER)
        other = drawn(pipe, "sd15", negative_prompt="green star")
        with pytest.raises(ValueError, match="guidance_scale=5 together with the public SpeedUpNet adapter"):
            drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=5.0)
    assert count.rows == 4 and apart(acts, other) > 1e-4
    with pytest.raises(ValueError, match="baked in"):
        SpeedUpNet(file, strength=0.5).attach(pipe)


def test_the_public_file_has_128_tensors_and_38388480_values() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        adapter = SunAdapter.beside(unet, AdapterMeta(layout="v1"))
    values = list(adapter.state_dict().values())
    assert len(values) == 128 and sum(value.numel() for value in values) == 38_388_480


@pytest.mark.pipe
@pytest.mark.parametrize("layout", ["large", "v1"])
def test_damaged_files_are_refused_by_the_key(layout: str, tmp_path: Path) -> None:
    pipe, file = tiny("sd15"), tmp_path / "sun.safetensors"
    if layout == "v1":
        tensors = public(pipe)
        key = next(iter(tensors))
        save_file({name: value for name, value in tensors.items() if name != key}, file)
    else:
        save_adapter(noisy(pipe), file)
        tensors = load_file(file)
        key = next(name for name in tensors if name.endswith("to_v.weight"))
        metadata = _metadata(file)
        save_file({name: value for name, value in tensors.items() if name != key}, file, metadata)
    with pytest.raises(ValueError, match=rf"has no {key}: it is not whole"):
        load_adapter(file, pipe.unet)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        SpeedUpNet(file).attach(pipe)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


@pytest.mark.pipe
def test_adapters_of_another_base_are_refused_or_told_of(tmp_path: Path) -> None:
    sd15, sdxl = tiny("sd15"), tiny("sdxl")
    file = save_adapter(noisy(sd15), tmp_path / "sun.safetensors")
    for wrong in (file, noisy(sd15)):
        with pytest.raises(ValueError, match="another base"):
            SpeedUpNet(wrong).attach(sdxl)
    with pytest.raises(ValueError, match=r"128|no file|no adapter file"):
        SpeedUpNet(tmp_path / "none.safetensors").attach(sd15)
    from diffplug.samplers.fingerprint import architecture

    told = {"model": "0" * 32, "architecture": architecture(sd15)}
    with pytest.warns(UserWarning, match="SpeedUpNet adapter"):
        SpeedUpNet(noisy(sd15, **told)).attach(sd15)()


@pytest.mark.pipe
def test_a_scale_outside_of_the_range_is_told_of() -> None:
    pipe = tiny("sd15")
    with (
        plug(pipe, SpeedUpNet(noisy(pipe))),
        pytest.warns(UserWarning, match=r"guidance_scale=20: .* trained for 1 to 8"),
    ):
        drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=20.0)


@pytest.mark.pipe
@pytest.mark.parametrize("build", [wan_ti2v, ltx_i2v])
def test_timesteps_of_single_tokens_are_those_of_the_frames_that_are_made(build: Any) -> None:
    """Pipelines that are given a first frame tell the network a timestep for every token."""
    pipe = build()
    told = {"image": picture(32), "prompt": "a", "height": 32, "width": 32, "num_frames": 9}
    told |= {"num_inference_steps": 2, "output_type": "pt"}

    def made(**more: Any) -> torch.Tensor:
        return pipe(**told, **more, generator=torch.Generator().manual_seed(0)).frames

    base = made(guidance_scale=1.0)
    with plug(pipe, SpeedUpNet(noisy(pipe))):
        one, other = made(negative_prompt=OTHER), made(negative_prompt="green star")
        assert torch.equal(made(negative_prompt="a"), base)
    assert apart(one, other) > 1e-6 and apart(one, base) > 1e-6


@pytest.mark.pipe
def test_other_steps_than_the_adapter_was_made_for_are_told_of(tmp_path: Path) -> None:
    """The public file is for 4 steps on trailing timesteps; adapters of the second stage for theirs."""
    pipe = tiny("sd15")
    file = tmp_path / "public.safetensors"
    save_file(public(pipe), file)
    spaced = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with plug(pipe, SpeedUpNet(file)), pytest.warns(UserWarning) as told:
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=2)
    words = " ".join(str(one.message) for one in told)
    assert "num_inference_steps=2: this SpeedUpNet adapter was trained for 4" in words
    assert "trailing timesteps, the scheduler's are leading" in words
    with plug(pipe, SpeedUpNet(file), spaced), warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=4)
    with plug(pipe, SpeedUpNet(noisy(pipe, steps=(4,)))), pytest.warns(UserWarning, match="trained for 4"):
        drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=3)


@pytest.mark.pipe
def test_off_for_the_empty_prompt_where_its_figures_say_so() -> None:
    pipe = tiny("sd15")
    with plug(pipe, SpeedUpNet(noisy(pipe, empty="off"))):
        assert torch.equal(drawn(pipe, "sd15"), plain(pipe, "sd15"))
        assert apart(drawn(pipe, "sd15", negative_prompt=OTHER), plain(pipe, "sd15")) > 1e-3


@pytest.mark.pipe
@pytest.mark.parametrize("layout", ["large", "v1"])
def test_offloaded_pipelines_draw_the_same(layout: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny("sd15")
    with plug(pipe, SpeedUpNet(noisy(pipe, layout))):
        here = drawn(pipe, "sd15", negative_prompt=OTHER)
    accelerate.cpu_offload(pipe.unet, "cpu")
    with plug(pipe, SpeedUpNet(_fitting(layout))):
        assert apart(drawn(pipe, "sd15", negative_prompt=OTHER), here) < 1e-6


def _fitting(layout: str) -> SunAdapter:
    return noisy(tiny("sd15"), layout)


@pytest.mark.pipe
def test_taking_it_off_leaves_no_hook() -> None:
    pipe = tiny("sd15")
    undo = put_on(noisy(pipe), pipe.unet, NegativeState())
    undo()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in pipe.unet.modules())


@pytest.mark.pipe
def test_under_the_four_step_student_the_adapter_trained_on_it_is_taken() -> None:
    pipe = load("shapes")

    def name() -> str:
        file = shipped_adapter(pipe)
        return "" if file is None else file.name

    def made(**told: Any) -> torch.Tensor:
        start = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe("a cross", generator=start, output_type="latent", **told)[0])

    assert name() == "speedupnet.safetensors"
    with plug(pipe, FewStep("shapes", steps=2)):
        assert name() == "speedupnet.safetensors"
    with plug(pipe, FewStep("shapes", steps=4)):
        assert name() == "speedupnet-4.safetensors"
        alone = made()
    with plug(pipe, FewStep("shapes", steps=4), SpeedUpNet()), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not torch.equal(made(negative_prompt="red"), alone)
        assert torch.equal(made(), alone)
