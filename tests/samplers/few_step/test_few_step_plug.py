"""FewStep on pipelines that carry other things: style LoRAs, two transformers, steering; undo."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from few_step_kit import assert_same, delta, everything, factors, peft_file, recipe, watched
from few_step_pipelines import inputs, pipeline
from safetensors.torch import save_file

from diffplug.plug import plug
from diffplug.samplers import FewStep, Solver
from diffplug.samplers.few_step.adapter import NAME
from diffplug.samplers.few_step.catalogue import Row
from diffplug.testing import tiny

LAYERS = factors(tiny("sd15").unet)
CALL = {"prompt": "a red circle", "output_type": "latent"}


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return recipe(tmp_path, LAYERS)


def run(pipe: Any, seed: int = 0, **call: Any) -> torch.Tensor:
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(seed), **call}).images


@pytest.mark.pipe
def test_runtime_and_fused_make_the_same_picture(student: Path) -> None:
    pipe = tiny("sd15")
    pictures = []
    for merge in ("runtime", "fuse"):
        before = everything(pipe)
        with plug(pipe, FewStep(student, merge=merge)) as plugged:
            pictures.append(run(plugged))
        assert_same(before, everything(pipe))
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-5, atol=1e-4)
    assert not torch.allclose(pictures[0], run(pipe, num_inference_steps=4, guidance_scale=0.0), atol=1e-2)


@pytest.mark.pipe
@pytest.mark.parametrize("active", [True, False], ids=["style acts", "style is disabled"])
def test_a_style_lora_acts_on_beside_it_and_is_afterwards_as_it_was(student: Path, active: bool) -> None:
    pipe = tiny("sd15")
    style = {name: pair for name, pair in factors(pipe.unet, seed=7).items() if "attn" in name}
    pipe.load_lora_weights(peft_file(style, "unet"), adapter_name="style")
    pipe.set_adapters(["style"], [0.7])
    if not active:
        pipe.unet.disable_adapters()
    before, picture = everything(pipe), run(pipe, num_inference_steps=3)
    scaling = {n: dict(p.scaling) for n, p in pipe.unet.named_modules() if hasattr(p, "scaling")}
    few = FewStep(student)
    with plug(pipe, few):
        assert few.installed[0].how == "runtime"
        name = next(iter(style))
        layer = pipe.unet.get_submodule(name)
        x = torch.randn(2, layer.in_features)
        base = layer.get_base_layer()
        change = delta(*LAYERS[name]) + (0.7 if active else 0.0) * delta(*style[name])
        torch.testing.assert_close(
            layer(x), torch.nn.functional.linear(x, base.weight + change, base.bias), rtol=1e-5, atol=1e-5
        )
        assert pipe.unet.get_submodule("conv_in").active_adapters == [NAME]
    assert_same(before, everything(pipe))
    assert scaling == {n: dict(p.scaling) for n, p in pipe.unet.named_modules() if hasattr(p, "scaling")}
    assert torch.equal(run(pipe, num_inference_steps=3), picture)


@pytest.mark.pipe
@pytest.mark.parametrize("merge", ["runtime", "fuse"])
def test_a_style_lora_that_comes_meanwhile_stays(student: Path, merge: str) -> None:
    pipe = tiny("sd15")
    style = {name: pair for name, pair in factors(pipe.unet, seed=7).items() if "attn" in name}
    before = pipe.unet.conv_in
    undo = plug(pipe, FewStep(student, merge=merge))
    pipe.load_lora_weights(peft_file(style, "unet"), adapter_name="later")
    undo()
    assert pipe.get_list_adapters() == {"unet": ["later"]} and pipe.unet.conv_in is before
    layer = pipe.unet.get_submodule(next(iter(style)))
    assert layer.active_adapters == ["later"]
    torch.testing.assert_close(layer.get_delta_weight("later"), delta(*style[next(iter(style))]))


@pytest.mark.pipe
def test_set_adapters_means_what_it_says_since_the_trained_scale_lies_in_the_factors(student: Path) -> None:
    pipe = tiny("sd15")
    recipe(student, LAYERS, lora_scale=0.125)
    with plug(pipe, FewStep(student, merge="runtime")):
        pipe.set_adapters([NAME], [1.0])
        change = pipe.unet.conv_in.get_delta_weight(NAME)
        torch.testing.assert_close(change, 0.125 * delta(*LAYERS["conv_in"]))


@pytest.mark.pipe
def test_the_strength_multiplies_the_trained_scale(student: Path) -> None:
    pipe = tiny("sd15")
    recipe(student, LAYERS, lora_scale=0.125)
    before = pipe.unet.conv_in.weight.clone()
    with plug(pipe, FewStep(student, strength=0.5, merge="fuse")):
        change = pipe.unet.conv_in.weight - before
        torch.testing.assert_close(change, 0.0625 * delta(*LAYERS["conv_in"]), rtol=0, atol=1e-6)


@pytest.mark.pipe
def test_half_precision_is_fused_in_float32_and_undone_to_the_bit(student: Path) -> None:
    pipe = tiny("sd15").to(torch.bfloat16)
    before = everything(pipe)
    with plug(pipe, FewStep(student, merge="fuse")):
        wide = before["0.conv_in.weight"].float() + delta(*LAYERS["conv_in"])
        assert torch.equal(pipe.unet.conv_in.weight, wide.to(torch.bfloat16))
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_auto_keeps_an_adapter_where_rounding_would_lose_the_change(student: Path) -> None:
    small = {name: (0.02 * down, 0.02 * up) for name, (down, up) in LAYERS.items()}
    recipe(student, small)
    chosen = {}
    for dtype in (torch.float32, torch.bfloat16):
        pipe, few = tiny("sd15").to(dtype), FewStep(student)
        with plug(pipe, few):
            chosen[dtype] = few.installed[0].how
    assert chosen == {torch.float32: "fuse", torch.bfloat16: "runtime"}


@pytest.mark.pipe
def test_a_part_of_the_run(student: Path) -> None:
    pipe = tiny("sd15")
    strengths: list[float] = []
    before = everything(pipe)
    with plug(pipe, FewStep(student, strength=0.8, part=(0.0, 0.5))):
        hook = pipe.unet.register_forward_pre_hook(
            lambda module, args: strengths.append(module.conv_in.scaling[NAME])
        )
        for _ in range(2):
            run(pipe)
        hook.remove()
    assert strengths == [0.8, 0.8, 0.0, 0.0] * 2
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_it_nests_with_a_searched_schedule(student: Path) -> None:
    """Weights and guidance of the checkpoint, steps of another plug; in either order."""
    pipe = tiny("sd15")
    before = everything(pipe)
    for plugs in (
        (FewStep(student, schedule=False), Solver(solver="unipc")),
        (Solver(solver="unipc"), FewStep(student, schedule=False)),
    ):
        with plug(pipe, *plugs), watched(pipe) as seen:
            run(pipe, num_inference_steps=3)
            assert type(pipe.scheduler).__name__ == "SolverScheduler"
            assert len(seen.rows) == 3 and sum(seen.rows) == 3
        assert_same(before, everything(pipe))


@pytest.mark.pipe
@pytest.mark.parametrize("churn", [1.0, None])
def test_it_can_be_steered(student: Path, churn: float | None) -> None:
    """A deterministic recipe parts its particles by churn, or by the eta of its own steps."""
    from diffplug.steering import FeynmanKac

    pipe = tiny("sd15")

    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2))

    before = everything(pipe)
    steerer = FeynmanKac(redness, particles=3, seed=0, **({"churn": churn} if churn else {}))
    few = FewStep(student) if churn else FewStep(student, eta=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with plug(pipe, few, steerer), watched(pipe) as seen:
            images = pipe("a red circle", output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 1 and sum(seen.rows) == 3 * 4
    assert seen.timesteps == [999, 749, 499, 249]
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_transitions_know_the_list() -> None:
    """Mean and std of a step are those of the scheduler, on a list that Diffusers' DDIM would leave."""
    from diffplug.samplers.few_step import ListedDDIMScheduler
    from diffplug.transition import transition

    scheduler = ListedDDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(timesteps=[999, 665, 332])
    x, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    for t in scheduler.timesteps:
        output = torch.tanh(x)
        step = transition(scheduler, output, t, x, eta=0.6)
        result = scheduler.step(output, t, x, eta=0.6, variance_noise=noise)
        torch.testing.assert_close(step.mean + step.std * noise, result.prev_sample, rtol=1e-4, atol=1e-4)
        x = result.prev_sample


# ---------------------------------------------------------------------------------------- image to image


def _free(folder: Path) -> Path:
    return recipe(folder, LAYERS, steps=[1, 2, 3, 4], timesteps={}, grid="tcd", scheduler="TCDScheduler")


@pytest.mark.pipe
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_are_evaluations_where_the_row_serves_any_number(
    tmp_path: Path, steps: int, strength: float
) -> None:
    pipe = tiny("sd15-img2img")
    call = {**tiny.inputs("sd15-img2img"), "strength": strength, "num_inference_steps": steps}
    with plug(pipe, FewStep(_free(tmp_path))), watched(pipe) as seen:
        pipe(**call)
    assert len(seen.rows) == steps
    assert seen.timesteps[0] <= 1000 * strength


@pytest.mark.pipe
def test_a_list_is_run_from_the_strength_on(student: Path) -> None:
    pipe = tiny("sd15-img2img")
    call = tiny.inputs("sd15-img2img")
    del call["num_inference_steps"]
    with plug(pipe, FewStep(student)), watched(pipe) as seen:
        with pytest.warns(UserWarning, match="runs the last 2 of its 4 steps"):
            pipe(**{**call, "strength": 0.5})
        assert seen.timesteps == [499, 249]
        with pytest.raises(ValueError, match=r"needs a strength of at least 0\.25"):
            pipe(**{**call, "strength": 0.2})


# ------------------------------------------------------------------------------- two transformers, controls


def _two_files(folder: Path, pipe: Any) -> list[Path]:
    paths = []
    for index, component in enumerate(("transformer", "transformer_2")):
        layers = factors(getattr(pipe, component), seed=index)
        paths.append(folder / f"{component}.safetensors")
        save_file(peft_file(layers, "transformer"), str(paths[-1]))
    return paths


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["wan22-t2v-lightx2v-4", "wan22-seko-4"])
def test_two_transformers_two_strengths_and_two_steps_each(tmp_path: Path, name: str) -> None:
    pipe = pipeline("wan-t2v-2")
    paths = _two_files(tmp_path, pipe)
    before = everything(pipe)
    calls: list[str] = []
    hooks = [
        getattr(pipe, part).register_forward_pre_hook(lambda *_, part=part: calls.append(part))
        for part in ("transformer", "transformer_2")
    ]
    few = FewStep(name, weights=paths, strength=(0.7, 1.0), merge="runtime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        undo = plug(pipe, few)
    assert [each.strength for each in few.installed] == [0.7, 1.0]
    assert pipe.transformer.proj_out.scaling[NAME] == 0.7
    assert pipe.transformer_2.proj_out.scaling[NAME] == 1.0
    pipe(**{key: value for key, value in inputs("wan-t2v-2").items() if "negative" not in key})
    undo()
    for hook in hooks:
        hook.remove()
    assert calls == ["transformer"] * 2 + ["transformer_2"] * 2
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_a_bad_second_file_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    pipe = pipeline("wan-t2v-2")
    paths = _two_files(tmp_path, pipe)
    save_file({"transformer.nowhere.lora_A.weight": torch.ones(2, 4)}, str(paths[1]))
    before = everything(pipe)
    for merge in ("runtime", "fuse"):
        with pytest.raises(ValueError, match="nowhere"):
            plug(pipe, FewStep("wan22-t2v-lightx2v-4", weights=paths, merge=merge))
        assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_controlnet_and_an_inpainting_unet_take_it_unchanged(student: Path) -> None:
    control = tiny("controlnet")
    with plug(control, FewStep(student)), watched(control) as seen:
        control(**{key: v for key, v in tiny.inputs("controlnet").items() if key != "num_inference_steps"})
    assert len(seen.rows) == 4

    parts = {**tiny("sd15").components}
    parts["unet"] = diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 9})
    inpaint = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    recipe(student, {name: pair for name, pair in LAYERS.items() if name != "conv_in"})
    image = torch.rand(1, 3, 16, 16)
    before = everything(inpaint)
    with plug(inpaint, FewStep(student)), watched(inpaint) as seen:
        inpaint(
            prompt="a",
            image=image,
            mask_image=torch.ones(1, 1, 16, 16),
            height=16,
            width=16,
            output_type="latent",
        )
    assert len(seen.rows) == 4
    assert_same(before, everything(inpaint))


@pytest.mark.pipe
def test_a_flux_control_model_gets_the_factors_widened(tmp_path: Path) -> None:
    """Its x_embedder takes the control picture as well; the file's factors know nothing of it."""
    plain = tiny("flux")
    parts = {
        key: value
        for key, value in plain.components.items()
        if key not in ("image_encoder", "feature_extractor")
    }
    make = diffusers.FluxTransformer2DModel.from_config
    parts["transformer"] = make(plain.transformer.config, in_channels=8, out_channels=4)
    pipe = diffusers.FluxControlPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    layers = factors(plain.transformer)
    save_file(peft_file(layers, "transformer"), str(tmp_path / "hyper.safetensors"))
    before = everything(pipe)
    few = FewStep("hyper-flux-8", weights=tmp_path / "hyper.safetensors")
    with plug(pipe, few), watched(pipe) as seen:
        assert few.installed[0].how == "runtime"
        change = pipe.transformer.x_embedder.get_delta_weight(NAME)
        torch.testing.assert_close(change[:, :4], 0.125 * delta(*layers["x_embedder"]))
        assert not change[:, 4:].any()
        pipe("a", control_image=torch.rand(1, 3, 16, 16), height=16, width=16, output_type="latent")
    assert len(seen.rows) == 8
    assert_same(before, everything(pipe))


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.pipe
def test_motion_modules_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """AnimateDiff-Lightning brings weights of its own, and their noise levels, which are not the base's."""
    pipe, file = tiny("animatediff"), tmp_path / "motion.safetensors"
    motion = {name: value + 0.01 for name, value in pipe.motion_adapter.state_dict().items()}
    save_file(motion, file)
    before = everything(pipe)
    with plug(pipe, FewStep("animatediff-lightning", steps=4, weights=file)):
        own = pipe.unet.state_dict()
        assert all(torch.equal(own[name], value) for name, value in motion.items())
        assert pipe.scheduler.config["beta_schedule"] == "linear"
    assert_same(before, everything(pipe))
    with pytest.raises(ValueError, match="is for a denoiser with motion_modules"):
        plug(tiny("sd15"), FewStep("animatediff-lightning", steps=4, weights=file))
    with pytest.raises(ValueError, match=r"strength=0.5 .* is all of the motion modules"):
        plug(pipe, FewStep("animatediff-lightning", steps=4, weights=file, strength=0.5))
    save_file(dict(list(motion.items())[1:]), file)
    with pytest.raises(ValueError, match=r"incomplete .* is missing"):
        plug(pipe, FewStep("animatediff-lightning", steps=4, weights=file))
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_two_few_step_checkpoints_are_refused(student: Path) -> None:
    pipe = tiny("sd15")
    with plug(pipe, FewStep(student)):
        for other, said in ((True, "both claim"), (False, "carries a few-step checkpoint already")):
            with pytest.raises(ValueError, match=said):
                plug(pipe, FewStep(student, schedule=other))
    for merge in ("runtime", "fuse"):
        undo = plug(pipe, FewStep(student, merge=merge, schedule=False))
        with pytest.raises(ValueError, match="carries a few-step checkpoint already"):
            plug(pipe, FewStep(student))
        undo()
    with pytest.raises(ValueError, match="both claim the pipeline's scheduler"):
        plug(pipe, FewStep(student), Solver(solver="unipc"))


@pytest.mark.pipe
def test_a_lora_that_is_fused_already_is_refused(student: Path) -> None:
    pipe = tiny("sd15")
    pipe.load_lora_weights(peft_file(LAYERS, "unet"), adapter_name="style")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="fused into the unet already"):
        plug(pipe, FewStep(student))


@pytest.mark.pipe
def test_a_quantised_base_keeps_its_weights(student: Path) -> None:
    pipe = tiny("sd15")
    pipe.unet.is_quantized = True
    with pytest.raises(ValueError, match="cannot be fused: it is quantised"):
        plug(pipe, FewStep(student, merge="fuse"))
    few = FewStep(student)
    with plug(pipe, few):
        assert few.installed[0].how == "runtime"


@pytest.mark.pipe
def test_guidance_that_would_compound_is_refused_unless_insisted_on(student: Path) -> None:
    pipe = tiny("sd15")
    with plug(pipe, FewStep(student)), watched(pipe) as seen:
        for harmless in (0.0, 1.0, None):
            run(pipe, guidance_scale=harmless)
        assert set(seen.rows) == {1}
        with pytest.raises(ValueError, match="guide what was distilled with guidance already"):
            run(pipe, guidance_scale=5.0)
    with plug(pipe, FewStep(student, guidance=1.5)), watched(pipe) as seen:
        run(pipe, negative_prompt="blue")
        assert seen.rows == [2] * 4


@pytest.mark.pipe
def test_a_negative_prompt_that_cannot_act_is_told(student: Path) -> None:
    pipe = tiny("sd15")
    with plug(pipe, FewStep(student)):
        with pytest.warns(UserWarning, match="negative_prompt does nothing"):
            with_negative = run(pipe, negative_prompt="blue")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(run(pipe, negative_prompt=" "), with_negative)
            assert torch.equal(run(pipe), with_negative)


@pytest.mark.pipe
def test_guidance_outside_the_advised_range_is_told(student: Path) -> None:
    recipe(
        student, LAYERS, guidance="cfg", guidance_scale=5.0, guidance_range=[3.5, 8.0], negative_prompt=True
    )
    pipe = tiny("sd15")
    with plug(pipe, FewStep(student)), watched(pipe) as seen:
        with pytest.warns(UserWarning, match=r"was made for 3\.5 to 8"):
            run(pipe, guidance_scale=12.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run(pipe, guidance_scale=4.0, negative_prompt="blue")
    assert set(seen.rows) == {2}


@pytest.mark.pipe
def test_steps_of_a_call(student: Path) -> None:
    pipe = tiny("sd15")
    with plug(pipe, FewStep(student)), watched(pipe) as seen:
        run(pipe, num_inference_steps=4)
        with pytest.raises(ValueError, match="num_inference_steps=5: student-4 was made for 4 steps"):
            run(pipe, num_inference_steps=5)
        with pytest.warns(UserWarning, match="timesteps of the call replace"):
            run(pipe, timesteps=[999, 499])
    assert seen.timesteps == [999, 749, 499, 249, 999, 499]
    with plug(pipe, FewStep(student, steps=4)), pytest.raises(ValueError, match="plugged in for 4 steps"):
        run(pipe, num_inference_steps=8)


@pytest.mark.contract
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"steps": 5}, "has no 5 steps, only 4"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": "much"}, "strength is 'much'"),
        ({"merge": "melt"}, "merge is 'melt'"),
        ({"guidance": -1.0}, r"guidance is -1\.0"),
        ({"eta": 1.5}, r"eta is 1\.5"),
        ({"part": (0.5, 0.5)}, "0 <= start < end <= 1"),
        ({"part": 0.5}, "part is 0.5"),
        ({"part": (0.0, 0.5), "merge": "fuse"}, "part of the run"),
        ({"eta": 1.0, "schedule": False}, "eta belongs to the steps"),
        ({"strength": {"transformer": 0.5}}, "strength names transformer: student-4 changes unet"),
    ],
)
def test_options_that_cannot_be_meant(student: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plug(tiny("sd15"), FewStep(student, **options))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": 0.5}, "strength=0.5 is for a LoRA: sdxl-turbo is a whole pipeline"),
        ({"merge": "fuse"}, "merge='fuse' is for a LoRA"),
        ({"part": (0.0, 0.5)}, "is for a LoRA"),
        ({"weights": "a.safetensors"}, "sdxl-turbo is a whole pipeline"),
        ({"eta": 0.5}, "eta=0.5 does nothing: sdxl-turbo runs on EulerAncestralDiscreteScheduler"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    pipe = tiny("sdxl")
    before = everything(pipe)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        plug(pipe, FewStep("sdxl-turbo", **options))
    assert_same(before, everything(pipe))


@pytest.mark.pipe
def test_true_guidance_beside_an_embedded_one_is_refused() -> None:
    pipe = pipeline("flux-schnell")
    with plug(pipe, FewStep("schnell")), pytest.raises(ValueError, match="twice a step, which runs once"):
        pipe(**inputs("flux-schnell"), true_cfg_scale=4.0, negative_prompt="blue")


@pytest.mark.pipe
def test_an_offloaded_network_keeps_its_weights(student: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe, cpu = tiny("sd15"), torch.device("cpu")
    wanted = None
    for offloaded in (False, True):
        if offloaded:
            apply_group_offloading(
                pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
            )
            with pytest.raises(ValueError, match="cannot be fused: it is offloaded"):
                plug(pipe, FewStep(student, merge="fuse"))
        few = FewStep(student)
        with plug(pipe, few):
            assert few.installed[0].how == ("runtime" if offloaded else "fuse")
            picture = run(pipe)
        wanted = picture if wanted is None else wanted
        torch.testing.assert_close(picture, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.contract
def test_names_families_and_files_that_are_not_there(tmp_path: Path, student: Path) -> None:
    pipe = tiny("sd15")
    before = everything(pipe)
    cases: list[tuple[Any, str]] = [
        (lambda: FewStep("hypersd"), r"unknown few-step recipe 'hypersd'\. Did you mean 'hyper-sd'"),
        (lambda: FewStep("hyper-sd@4", steps=8), "says 4 steps, steps=8"),
        (lambda: FewStep("hyper-sd@40"), "has no 40 steps"),
        (
            lambda: FewStep("schnell"),
            "for flux-schnell; this pipeline is sd15: for sd15 there are .*hyper-sd",
        ),
        (lambda: FewStep("lightning-4"), "lightning is for .*sdxl"),
        (lambda: FewStep("kandinsky6-distill"), "PiflowScheduler, which must not be replaced"),
        (lambda: FewStep("hyper-sd@4"), "hf download ByteDance/Hyper-SD Hyper-SD15-4steps-lora.safetensors"),
        (lambda: FewStep("hyper-sd@4", weights=tmp_path / "no.safetensors"), "there is no weight file"),
        (lambda: FewStep(tmp_path / "none"), "holds no few-step recipe"),
        (lambda: FewStep(str(tmp_path / "none" / "recipe.json")), "holds no few-step recipe"),
        (lambda: FewStep(3), "names no few-step recipe"),  # type: ignore[arg-type]
        (lambda: FewStep(student, strength=(1.0, 1.0)), "has 1 weight files, strength has 2"),
        (lambda: FewStep(student, weights=["a", "b"]), "has 1 weight files, weights= has 2"),
    ]
    for make, said in cases:
        with pytest.raises(ValueError, match=said) as caught:
            plug(pipe, make())
        assert "\n" not in str(caught.value)
        assert_same(before, everything(pipe))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": []}, "steps are whole numbers"),
        ({"nam": "x"}, "unknown key of a few-step recipe 'nam'. Did you mean 'name'"),
        ({"name": "Big Name"}, "lower-case letters"),
        ({"version": 2}, "of version 2"),
        ({"format": "solver-schedule"}, "format is 'solver-schedule'"),
        ({"timesteps": {"4": [999, 499]}}, "timesteps for 4 steps"),
        ({"timesteps": {"4": [249, 499, 749, 999]}}, "give 4 falling numbers"),
        ({"guidance": "cfg"}, "needs guidance_scale"),
        ({"guidance": "strong"}, "guidance is 'strong', allowed are 'off'"),
        ({"negative_prompt": True}, "acts only with guidance 'cfg'"),
        ({"scheduler": 1e308}, r"scheduler is 1e\+308, a text is expected"),
        ({"verified": False}, "needs a doubt"),
        ({"eta": 2}, "eta is 2"),
        ({"lora_scale": 0}, "lora_scale is 0"),
        ({"weights": [{"file": "../a.safetensors", "component": "unet"}]}, "leads outside"),
        ({"weights": [{"fle": "a"}]}, "unknown key of weights 'fle'"),
        ({"weights": []}, "needs weights"),
        ({"steps": 4}, "wrong type"),
        ({"licence": ""}, "must not be empty"),
        ({"scheduler": "NoSuchScheduler"}, "there is no scheduler 'NoSuchScheduler'"),
        ({"family": "sdxl"}, "student-4 is for sdxl; this pipeline is sd15"),
    ],
)
def test_bad_recipes_are_refused_in_a_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    recipe(tmp_path, LAYERS, **change)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as caught:
        plug(tiny("sd15"), FewStep(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.pipe
def test_a_row_that_is_not_verified_says_so(student: Path) -> None:
    recipe(student, LAYERS, verified=False, doubt="the shift was read second-hand.")
    with pytest.warns(UserWarning, match=r"student-4 is not verified: the shift was read second-hand\."):
        plug(tiny("sd15"), FewStep(student))()


@pytest.mark.pipe
def test_a_whole_pipeline_loaded_from_elsewhere_is_told() -> None:
    pipe = tiny("sdxl")
    pipe.register_to_config(_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")
    with pytest.warns(UserWarning, match="is for the weights of stabilityai/sdxl-turbo, this pipeline has"):
        plug(pipe, FewStep("sdxl-turbo"))()


@pytest.mark.contract
def test_a_row_object_and_rows_of_ones_own(student: Path) -> None:
    row = Row.load(student)
    assert (
        FewStep(row).name == "student-4"
        and FewStep("student-4", catalogue=student / "recipe.json").steps is None
    )
