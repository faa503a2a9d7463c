"""NegativeGuidance: the right method for each pipeline, exact guidance in a part of a run, and no silent
loss.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from negative_pipelines import apart, drawn, plain

from diffplug import plug
from diffplug.network.denoiser import count_network
from diffplug.samplers.negative.classifier_free import ClassifierFree
from diffplug.samplers.negative.guidance import NegativeGuidance
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.samplers.negative.sun_adapter import SunAdapter
from diffplug.testing import tiny

OTHER = "blue square"
GUIDED = [
    "sd15",
    "sdxl",
    "sd3",
    "qwenimage",
    "z-image",
    "wan",
    "pixart",
    "sana",
    "lumina2",
    "chroma",
    "animatediff",
]


@pytest.mark.law
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_in_no_step_is_the_plain_run_and_in_all_steps_guidance(name: str) -> None:
    pipe = tiny(name)
    told = {"negative_prompt": OTHER, "num_inference_steps": 3}
    with plug(pipe, ClassifierFree(interval=(0.99, 1.0))):
        never = drawn(pipe, name, **told)
    with plug(pipe, ClassifierFree(interval=(0.0, 0.99))):
        always = drawn(pipe, name, **told)
    with plug(pipe, NegativeGuidance("cfg")):
        exact = drawn(pipe, name, **told)
    base = plain(pipe, name, num_inference_steps=3)
    assert apart(never, base) < 1e-4 * float(base.abs().max())
    assert torch.equal(always, exact)
    assert apart(exact, base) > 1e-5


@pytest.mark.pipe
def test_half_a_run_with_guidance_costs_three_quarters() -> None:
    pipe = tiny("sd15")
    rows: list[int] = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    with plug(pipe, NegativeGuidance("interval", interval=(0.0, 0.5))):
        half = drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=4)
    assert rows == [2, 2, 1, 1]
    changes: dict[str, Any] = {
        "callback_on_step_end": _off_after(1),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    by_hand = drawn(pipe, "sd15", negative_prompt=OTHER, num_inference_steps=4, **changes)
    assert apart(half, by_hand) < 1e-5


def _off_after(step: int) -> Any:
    def callback(pipe: Any, i: int, t: Any, told: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if i == step else pipe._guidance_scale
        return {"prompt_embeds": told["prompt_embeds"][-1:]} if i == step else {}

    return callback


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("name", "told", "rows"),
    [
        ("sd15", {}, 4),  # its own guidance
        ("sd15", {"guidance_scale": 1.0}, 2),  # off: NAG
        ("flux", {}, 2),  # told its scale: NAG
        ("flux2-klein", {}, 2),
        ("lcm", {}, 2),
        ("qwenimage", {"true_cfg_scale": 1.0}, 2),
        ("lumina2", {}, 4),
    ],
)
def test_auto_takes_guidance_where_it_is_on_and_nag_where_it_is_off(
    name: str, told: dict[str, Any], rows: int
) -> None:
    pipe = tiny(name)
    without = drawn(pipe, name, **told)
    with plug(pipe, NegativeGuidance()), count_network(pipe) as count:
        found = drawn(pipe, name, negative_prompt=OTHER, **told)
    assert count.rows == rows
    assert apart(found, without) > 1e-5


@pytest.mark.pipe
def test_auto_takes_an_adapter_that_is_given() -> None:
    pipe = tiny("sd15")
    adapter = _noisy(pipe)
    with plug(pipe, guidance := NegativeGuidance(adapter=adapter)), count_network(pipe) as count:
        one = drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=3.0)
    assert guidance.method == "sun" and count.rows == 2
    with plug(pipe, SpeedUpNet(adapter)):
        assert torch.equal(drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=3.0), one)


@pytest.mark.pipe
def test_shapes_comes_with_an_adapter_that_obeys_at_one_evaluation_a_step() -> None:
    from diffplug import load
    from diffplug.shapes.grading import as_pixels, find

    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    assert sum(value.numel() for value in SpeedUpNet().adapter_for(pipe).parameters()) < 0.1 * sum(
        value.numel() for value in pipe.unet.parameters()
    )

    def orange(guidance: Any, **told: Any) -> int:
        """How many of 12 squares are orange."""
        seeds = [torch.Generator().manual_seed(i) for i in range(12)]
        with warnings.catch_warnings(), plug(pipe, guidance), count_network(pipe) as count:
            warnings.simplefilter("error")
            images = pipe(
                ["a square and a circle"] * 12,
                num_inference_steps=10,
                generator=seeds,
                output_type="pt",
                **told,
            ).images
        assert count.rows == 12 * 10
        return sum(any(blob.color == "orange" for blob in blobs) for _, blobs in find(as_pixels(images)))

    guidance = NegativeGuidance()
    assert orange(guidance, negative_prompt="orange", guidance_scale=5.0) < orange(
        guidance, guidance_scale=5.0
    )
    assert guidance.method == "sun"


@pytest.mark.pipe
@pytest.mark.parametrize("method", ["cfg", "nag"])
def test_strength_0_is_no_guidance_and_more_goes_further(method: str) -> None:
    pipe = tiny("sd15")
    base = plain(pipe, "sd15")
    far = []
    for strength in (0.0, 0.5, 1.0):
        with plug(pipe, NegativeGuidance(method, strength=strength)):
            far.append(apart(drawn(pipe, "sd15", negative_prompt=OTHER), base))
    assert far[0] < 1e-5 < far[1] < far[2]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"method": "magic"}, "method is 'magic', allowed are 'auto', 'cfg'"),
        ({"method": "cfg", "scale": 3.0}, "scale does nothing with method='cfg'"),
        ({"method": "nag", "interval": (0, 0.5)}, "interval does nothing"),
        ({"method": "nag", "adapter": "a.safetensors"}, "adapter does nothing"),
        ({"method": "nag", "tua": 2.0}, "tau"),
        ({"method": "interval", "interval": (0.5, 0.5)}, "two shares of the run"),
        ({"strength": -1}, "strength is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(told: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NegativeGuidance(**told)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("flux", "cfg", "would guide twice: take method='nag'"),
        ("lcm", "interval", "would guide twice"),
        ("flux2-klein", "cfg", "no guidance with a negative prompt"),
        ("auraflow", "nag", "take method='cfg'"),
        ("sd3", "sun", "no cross-attention layers"),
        ("sd15", "sun", "no SpeedUpNet adapter for this"),
    ],
)
def test_methods_that_a_pipeline_cannot_do_are_refused_before_anything_is_changed(
    name: str, method: str, words: str
) -> None:
    pipe = tiny(name)
    before = type(pipe)
    with pytest.raises(ValueError, match=words):
        plug(pipe, NegativeGuidance(method))
    assert type(pipe) is before


@pytest.mark.pipe
def test_a_negative_prompt_without_guidance_is_not_ignored() -> None:
    with plug(pipe := tiny("sd15"), NegativeGuidance("cfg")):
        with pytest.raises(ValueError, match=r"guidance_scale=1.0 leaves guidance off.*method='nag'"):
            drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=1.0)
        drawn(pipe, "sd15", guidance_scale=1.0)
    with (
        plug(pipe := tiny("lumina2"), NegativeGuidance()),
        pytest.raises(ValueError, match="would be ignored"),
    ):
        drawn(pipe, "lumina2", negative_prompt=OTHER, guidance_scale=1.0)


@pytest.mark.pipe
def test_pipelines_without_a_negative_prompt_take_one_only_while_it_is_plugged_in() -> None:
    pipe = tiny("flux2-klein")
    with plug(pipe, NegativeGuidance()):
        drawn(pipe, "flux2-klein", negative_prompt=OTHER)
    with pytest.raises(TypeError, match="negative_prompt"):
        drawn(pipe, "flux2-klein", negative_prompt=OTHER)


@pytest.mark.pipe
def test_two_of_them_contradict_each_other() -> None:
    with plug(pipe := tiny("sd15"), NegativeGuidance()), pytest.raises(ValueError, match="negative prompt"):
        plug(pipe, SpeedUpNet(_noisy(pipe)))


def _noisy(pipe: Any) -> SunAdapter:
    """An adapter that does something, at random."""
    adapter = SunAdapter.beside(pipe.unet)
    generator = torch.Generator().manual_seed(1)
    for value in adapter.parameters():
        value.data.normal_(std=0.2, generator=generator)
    return adapter.requires_grad_(False)
