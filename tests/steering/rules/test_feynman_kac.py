"""Feynman-Kac steering on tiny pipelines: outputs, reports, errors, and families."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.steering import BestOfN, FeynmanKac, Resampling, Scoring
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe

PROMPTS = ["a red circle", "a blue square"]


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red of pictures [n, 3, h, w] in [0, 1]."""
    assert images.ndim == 4
    assert images.dtype == torch.float32
    assert len(prompts) == len(images)
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Return a tiny Stable Diffusion pipeline with a stochastic solver."""
    built = tiny("sd15")
    built.scheduler = EulerAncestralDiscreteScheduler.from_config(built.scheduler.config)
    return built


def run(pipe: Any, steerer: Any, prompt: Any = PROMPTS, **kwargs: Any) -> Any:
    """Return the output of a short steered call."""
    kwargs = {
        "num_inference_steps": 5,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(0),
        **kwargs,
    }
    with plug(pipe, steerer) as plugged:
        return plugged(prompt, **kwargs)


def test_the_report_says_what_happened(pipe: Any) -> None:
    steerer = FeynmanKac(red, particles=4, strength=2000.0, selection=Resampling(ess_threshold=None))
    assert steerer.report is None
    images = run(pipe, steerer).images
    report = steerer.report
    assert len(images) == 2
    assert report.calls == (1, 2, 3)
    assert report.steps == 5
    assert report.rewards.shape == report.ancestors.shape == (3, 2, 4)
    assert report.ess.shape == report.resampled.shape == report.distinct_roots.shape == (3, 2)
    assert report.final_rewards.shape == report.final_log_weights.shape == (2, 4)
    assert report.resampled.any()
    assert report.network_calls == 5
    assert report.network_rows == 5 * 2 * 8
    assert report.total_seconds > report.decode_seconds > 0
    best = report.final_rewards.argmax(-1).tolist()
    assert report.returned == ((best[0],), (best[1],))
    torch.testing.assert_close(red(images, PROMPTS).double(), report.final_rewards.amax(-1))
    parsed = json.loads(report.to_json())
    assert parsed["ancestors"] == report.ancestors.tolist()
    table = str(report)
    assert "a red circle" in table
    assert table.count("end ") == 2
    assert max(len(line) for line in table.splitlines()) <= 130


def test_rewards_see_the_prompt_of_their_slot(pipe: Any) -> None:
    seen: list[list[str]] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> list[float]:
        seen.append(prompts)
        return [0.0] * len(images)

    run(pipe, FeynmanKac(reward, particles=2, scoring=Scoring(at=(0.5,))))
    assert seen == [[PROMPTS[0]] * 2 + [PROMPTS[1]] * 2] * 2


def test_one_generator_per_prompt_gives_each_prompt_its_plain_picture_first(pipe: Any) -> None:
    def streams() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (11, 12)]

    plain = pipe(PROMPTS, num_inference_steps=5, output_type="pt", generator=streams()).images
    free = FeynmanKac(red, particles=3, strength=0.0, returns="all")
    every = run(pipe, free, generator=streams()).images
    assert free.report is not None and (free.report.steps, free.report.calls) == (5, ())
    torch.testing.assert_close(every[[0, 3]], plain, rtol=0, atol=1e-5)
    assert len({image.numpy().tobytes() for image in every}) == 6


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_the_output_keeps_its_form(pipe: Any, output_type: str) -> None:
    kind = {"pil": list, "np": np.ndarray, "pt": torch.Tensor, "latent": torch.Tensor}[output_type]
    images = run(
        pipe, BestOfN(red, particles=3), "a", output_type=output_type, num_images_per_prompt=2
    ).images
    assert isinstance(images, kind)
    assert len(images) == 2
    assert output_type != "pil" or isinstance(images[0], Image.Image)
    pictures, flags = run(pipe, BestOfN(red, particles=3), "a", output_type=output_type, return_dict=False)
    assert type(pictures) is kind
    assert len(pictures) == 1
    assert flags is None


def test_a_sample_is_drawn_from_the_final_weights(pipe: Any) -> None:
    steerer = FeynmanKac(red, particles=4, strength=1e6, returns="sample", scoring=Scoring(at=()))
    run(pipe, steerer)
    assert [slots[0] for slots in steerer.report.returned] == steerer.report.final_rewards.argmax(-1).tolist()


def test_steering_on_the_way_reaches_further_than_choosing_at_the_end(pipe: Any) -> None:
    """The mean over all particles rises well above that of free draws; k = 1 is the plain pipeline."""
    gain = []
    for seed in range(4):
        means = []
        for steerer in (
            FeynmanKac(red, particles=8, strength=3000.0, returns="all", scoring=Scoring(at="every")),
            BestOfN(red, particles=8, returns="all"),
        ):
            run(pipe, steerer, "a", generator=torch.Generator().manual_seed(seed), num_inference_steps=8)
            means.append(float(steerer.report.final_rewards.mean()))
        gain.append(means[0] - means[1])
    assert sum(gain) / len(gain) > 0.0005


def test_a_single_particle_is_the_plain_pipeline(pipe: Any) -> None:
    plain = pipe(
        PROMPTS, num_inference_steps=5, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert torch.equal(run(pipe, FeynmanKac(red, particles=1, strength=50.0)).images, plain)


def test_invalid_rewards_are_counted_and_survived(pipe: Any) -> None:
    def reward(images: torch.Tensor, prompts: list[str]) -> list[float]:
        return [math.nan, *red(images[1:], prompts[1:]).tolist()]

    steerer = FeynmanKac(reward, particles=4, strength=10.0)
    run(pipe, steerer, "a")
    assert steerer.report.invalid_rewards == 4
    assert (steerer.report.ancestors != 0).all()
    assert steerer.report.returned[0][0] != 0
    assert "NaN" in str(steerer.report)


def test_nothing_but_invalid_rewards_gives_slot_order_and_a_warning(pipe: Any) -> None:
    steerer = FeynmanKac(lambda images, prompts: [math.nan] * len(images), particles=3)
    with pytest.warns(UserWarning, match="for every finished picture of prompt 0"):
        run(pipe, steerer, "a", num_images_per_prompt=2)
    assert steerer.report.returned == ((0, 1),)
    assert json.loads(steerer.report.to_json())["log_z"] == [None]


def test_a_wrong_number_of_rewards_names_the_call(pipe: Any) -> None:
    steerer = FeynmanKac(lambda images, prompts: [1.0, 2.0, 3.0], particles=4)
    with pytest.raises(ValueError, match="the reward failed at step 2 of 5: .* 4 numbers"):
        run(pipe, steerer, "a")


def test_a_raising_reward_names_call_and_particle(pipe: Any) -> None:
    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if PROMPTS[1] in prompts:
            raise OSError("no blue today")
        return red(images, prompts)

    with pytest.raises(ValueError, match="step 2 of 5, particle 0 of prompt 1: OSError: no blue today"):
        run(pipe, FeynmanKac(reward, particles=2))
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler


def test_a_deterministic_solver_is_steered_with_one_warning(pipe: Any) -> None:
    stochastic, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    steerer = FeynmanKac(red, particles=4, strength=1e5, proposal=None, scoring=Scoring(at="every"))
    try:
        with pytest.warns(UserWarning, match="DDIMScheduler added no noise") as caught:
            run(pipe, steerer)
        assert len([w for w in caught if "added no noise" in str(w.message)]) == 1
        run(pipe, FeynmanKac(red, particles=4, strength=1e5), eta=1.0)
    finally:
        pipe.scheduler = stochastic


def test_embeddings_need_the_text_from_the_steerer(pipe: Any) -> None:
    embeds, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    options: dict[str, Any] = {"prompt_embeds": embeds, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match=r"pass scoring=Scoring\(prompts=\[\.\.\.\]\) to the steerer"):
        run(pipe, FeynmanKac(red, particles=2), None, **options)
    with pytest.raises(ValueError, match="the steerer has 1 prompts, the call has 2"):
        run(pipe, FeynmanKac(red, particles=2, scoring=Scoring(prompts="a")), None, **options)
    by_text = run(pipe, FeynmanKac(red, particles=2), guidance_scale=1.0).images
    by_embeds = run(
        pipe, FeynmanKac(red, particles=2, scoring=Scoring(prompts=PROMPTS)), None, **options
    ).images
    torch.testing.assert_close(by_text, by_embeds)


def test_a_caching_denoiser_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pipe.unet), "is_cache_enabled", True, raising=False)
    with pytest.raises(ValueError, match=r"call its disable_cache\(\) first"):
        run(pipe, FeynmanKac(red))


@pytest.mark.parametrize(
    "family", ["sdxl", "sd3", "flux", "wan", "controlnet", "pixart", "ddpm", "lcm", "sd15-img2img"]
)
@pytest.mark.filterwarnings("ignore:.*added no noise")
def test_every_family_is_steered(family: str) -> None:
    built = tiny(family)
    steerer = FeynmanKac(red, particles=2, strength=500.0)
    given = tiny.inputs(family, num_inference_steps=4)
    groups = 1 if family == "ddpm" else 2
    if groups == 2:
        given["prompt"] = PROMPTS
    before = type(built.scheduler)
    with plug(built, steerer) as plugged:
        output = plugged(**given)
    pictures = output.frames if hasattr(output, "frames") else output.images
    assert len(pictures) == groups
    assert steerer.report.calls[0] >= 1
    assert steerer.report.final_rewards.shape == (groups, 2)
    assert torch.isfinite(steerer.report.rewards).all()
    assert type(built.scheduler) is before


def test_seeds_make_a_stochastic_flow_run_repeatable() -> None:
    """FLUX hands no generator to the scheduler; with Seeds every particle has its own noise all the same."""
    built = tiny("flux")
    built.scheduler = type(built.scheduler).from_config(built.scheduler.config, stochastic_sampling=True)
    given = tiny.inputs("flux", num_inference_steps=4)
    ends = []
    for _ in range(2):
        with plug(built, Seeds(5), FeynmanKac(red, particles=3, strength=500.0, returns="all")) as plugged:
            ends.append(plugged(**given).images)
    assert torch.equal(ends[0], ends[1])
    assert len({image.numpy().tobytes() for image in ends[0]}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles=0"),
        ({"particles": 2.5}, "particles=2.5"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": math.inf}, "strength=inf"),
        ({"strength": math.nan}, "strength=nan"),
        ({"score_at": (0.5, 1.2)}, "score_at contains 1.2"),
        ({"score_at": (0.0,)}, "score_at contains 0.0"),
        ({"score_at": "often"}, "or 'every'"),
        ({"ess_threshold": 0.0}, "ess_threshold=0.0"),
        ({"resampler": "magic"}, "unknown resampler 'magic'"),
        ({"returns": "worst"}, "unknown returns 'worst'"),
        ({"tilt": "falling"}, "unknown tilt 'falling'"),
        ({"decode_batch_size": 0}, "decode_batch_size=0"),
        ({"reward": 3}, "cannot be called"),
        ({"strength": "10"}, "strength='10': it must be a number"),
        ({"score_at": 0.5}, "score_at=0.5: give a list of fractions"),
        ({"score_at": ("late",)}, "score_at='late': it must be a number"),
        ({"ess_threshold": "half"}, "ess_threshold='half': it must be a number"),
        ({"target_ess": None}, "target_ess=None: it must be a number"),
        ({"churn": "much"}, "churn='much': it must be a number"),
        ({"twist": "much"}, "twist='much': it must be a number"),
        ({"seed": 1.5}, "seed=1.5: give a whole number"),
        ({"seed": [1, "b"]}, "seed contains 'b'"),
        ({"prompts": 3}, "prompts=3: give the texts"),
        ({"decode": 3}, "decode=3 cannot be called"),
        ({"preview": 3}, "preview=3 decodes nothing"),
        ({"ranks": "all"}, "ranks='all': give True, False or Ranks"),
        ({"reward": "no_module:score"}, "'no_module' is no known name and no module .* Known: aesthetic"),
        ({"reward": "no-such-reward"}, "no-such-reward"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeynmanKac(**{"reward": red, **FeynmanKac.current_options(options)})


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"num_images_per_prompt": 0}, "num_images_per_prompt=0: it must be a whole number"),
        ({}, {"num_images_per_prompt": 2.5}, "num_images_per_prompt=2.5: it must be a whole number"),
        ({}, {"num_images_per_prompt": 3}, "num_images_per_prompt=3 pictures asked for but only 2 particles"),
        ({}, {"latents": torch.zeros(3, 4, 8, 8)}, "latents have 3 rows, but 2 prompts with 2 particles"),
        ({}, {"prompt": []}, "an empty list of prompts"),
        ({"decode": lambda *a, **k: torch.zeros(1, 3, 8, 8)}, {}, r"tensor of 4 pictures .* \(1, 3, 8, 8\)"),
        ({"decode": lambda *a, **k: None}, {}, "tensor of 4 pictures .* it returned NoneType"),
        ({"value": lambda state: 1 / 0}, {}, "the value failed at step 2 of 5: ZeroDivisionError"),
        ({"value": lambda state: None}, {}, "the value failed at step 2 of 5: RuntimeError"),
    ],
)
def test_bad_calls_are_refused_and_the_pipeline_is_as_before(
    pipe: Any, options: dict[str, Any], call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(
            pipe,
            FeynmanKac(red, particles=2, **FeynmanKac.current_options(options)),
            **{"prompt": PROMPTS, **call},
        )
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler
    assert type(pipe).__call__ is StableDiffusionPipeline.__call__


def test_a_reward_that_fails_late_names_the_call_and_leaves_nothing(pipe: Any) -> None:
    """Raising, a wrong shape, texts, at the second scored call of a run."""
    seen: list[int] = []

    def raising() -> Any:
        raise MemoryError("the scorer is full\nsee its log")

    for bad, told in (
        (raising, "MemoryError: the scorer is full$"),
        (lambda: torch.zeros(2, 2), "ValueError: .* must return 2 numbers .* shape"),
        (lambda: ["fine", "good"], "ValueError: .* must return 2 numbers .* texts, as 'fine'"),
    ):

        def reward(images: torch.Tensor, prompts: list[str], bad: Any = bad) -> Any:
            seen.append(len(images))
            return bad() if len(seen) == 2 else red(images, prompts)

        seen.clear()
        with pytest.raises(ValueError, match=f"the reward failed at step 3 of 5: {told}"):
            run(pipe, FeynmanKac(reward, particles=2, strength=3.0), "a")
        assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler
        assert type(pipe).__call__ is StableDiffusionPipeline.__call__


def test_seeds_must_fit_the_prompts(pipe: Any) -> None:
    with pytest.raises(ValueError, match="3 selection seeds for 2 prompts"):
        run(pipe, FeynmanKac(red, particles=2, seed=(1, 2, 3)))


def test_something_without_a_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="object has no scheduler"):
        FeynmanKac(red).attach(object())


def test_an_adapter_is_steered_and_strength_zero_leaves_it_alone() -> None:
    from peft import LoraConfig

    built = tiny("sd15")
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    built.unet.add_adapter(adapter, adapter_name="style")
    bare = run(tiny("sd15"), FeynmanKac(red, particles=2, strength=0.0, returns="all"), eta=1.0).images
    free = run(built, FeynmanKac(red, particles=2, strength=0.0, returns="all"), eta=1.0).images
    given = torch.Generator().manual_seed(0)
    plain = built(
        PROMPTS, num_inference_steps=5, num_images_per_prompt=2, eta=1.0, generator=given, output_type="pt"
    ).images
    assert torch.equal(torch.as_tensor(free), torch.as_tensor(plain))
    assert not torch.equal(torch.as_tensor(free), torch.as_tensor(bare)), "the adapter changes nothing"
    steerer = FeynmanKac(red, particles=4, strength=3000.0, selection=Resampling(ess_threshold=None))
    assert len(run(built, steerer, eta=1.0).images) == 2
    assert steerer.report is not None and bool(steerer.report.resampled.any())
    assert built.unet.active_adapters() == ["style"]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan"])
@pytest.mark.filterwarnings("ignore:.*added no noise")
def test_what_prefers_nothing_leaves_every_family_bit_for_bit(family: str) -> None:
    built, count = tiny(family), "num_videos_per_prompt" if family == "wan" else "num_images_per_prompt"

    def call(**options: Any) -> Any:
        given = tiny.inputs(family, num_inference_steps=3, prompt=PROMPTS)
        output = built(**{**given, "generator": torch.Generator().manual_seed(3), **options})
        return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)

    plain = call(**{count: 3})
    for strength, reward in ((0.0, red), (7.0, lambda images, prompts: [0.3] * len(images))):
        with plug(built, FeynmanKac(reward, particles=3, strength=strength, returns="all", proposal=None)):
            assert torch.equal(call(), plain), f"strength {strength} changes {family}"


def test_control_pictures_stay_with_their_prompt() -> None:
    built = tiny("controlnet")
    controls = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    embeds = built.encode_prompt(PROMPTS, "cpu", 1, False)[0]

    def streams(*groups: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(10 * g + slot) for g in groups for slot in range(3)]

    def steered(groups: list[int], by_embeds: bool = False) -> torch.Tensor:
        steerer = FeynmanKac(
            red,
            particles=3,
            strength=3000.0,
            returns="all",
            seed=groups,
            selection=Resampling(ess_threshold=None),
            scoring=Scoring(prompts=[PROMPTS[g] for g in groups]),
            proposal=None,
        )
        text = {"prompt_embeds": embeds[groups]} if by_embeds else {"prompt": [PROMPTS[g] for g in groups]}
        options: dict[str, Any] = {"eta": 1.0, "generator": streams(*groups), "guidance_scale": 1.0}
        with plug(built, steerer):
            images = built(
                **text, image=controls[groups], num_inference_steps=4, output_type="pt", **options
            ).images
        assert steerer.report is not None and bool(steerer.report.resampled.any())
        return images

    together = steered([0, 1])
    torch.testing.assert_close(together, torch.cat([steered([0]), steered([1])]), rtol=0, atol=1e-4)
    torch.testing.assert_close(together, steered([0, 1], by_embeds=True), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LLaDA2Pipeline", "was not selected"),
        ("MarigoldDepthPipeline", "it draws none"),
        ("SkyReelsV2DiffusionForcingPipeline", "denoises in chunks"),
        ("LEditsPPPipelineStableDiffusion", "leaves nothing to draw"),
        ("OnnxStableDiffusionPipeline", "NumPy"),
    ],
)
def test_pipelines_that_cannot_be_steered_are_refused_with_the_reason(name: str, reason: str) -> None:
    parent = type(name, (), {"scheduler": EulerAncestralDiscreteScheduler(), "__call__": lambda self: None})
    strange = type("Mine", (parent,), {})()
    with pytest.raises(ValueError, match=f"particles of Mine cannot be copied: .*{reason}.*BestOfN"):
        FeynmanKac(red).attach(strange)
    BestOfN(red).attach(strange)()
