"""NAG: its formula, its limits, every family it knows, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from negative_pipelines import CROSS, JOINT, apart, drawn, plain

from diffplug import plug
from diffplug.network.denoiser import count_network
from diffplug.samplers.negative.nag import NAG, PRESETS, NagOptions, nag
from diffplug.testing import tiny

OTHER = "blue square"


def heads(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.law
@given(st.floats(1, 20), st.floats(1, 8), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_no_token_grows_beyond_tau_and_equal_prompts_change_nothing(
    scale: float, tau: float, alpha: float, seed: int
) -> None:
    options = NagOptions(scale=scale, tau=tau, alpha=alpha)
    positive, negative = heads(seed, 2, 5, 8), heads(seed + 1, 2, 5, 8)
    whole = nag(positive, negative, NagOptions(scale=scale, tau=tau, alpha=1.0))
    sizes = [x.abs().sum(-1) for x in (whole, positive)]
    assert (sizes[0] <= tau * sizes[1] * (1 + 1e-5)).all()
    assert torch.equal(nag(positive, positive.clone(), options), positive)
    between = positive + alpha * (whole - positive)
    assert torch.allclose(nag(positive, negative, options), between, atol=1e-5)


@pytest.mark.law
def test_scale_1_and_alpha_0_are_the_prompt_alone_and_zero_tokens_stay_finite() -> None:
    positive, negative = heads(0, 1, 3, 4), heads(1, 1, 3, 4)
    for options in (NagOptions(scale=1.0), NagOptions(alpha=0.0)):
        assert torch.equal(nag(positive, negative, options), positive)
    positive[:, 1] = 0
    assert nag(positive, negative, NagOptions(scale=7.0)).isfinite().all()
    assert nag(positive, negative, NagOptions(scale=7.0, tau=math.inf)).isfinite().all()


@pytest.mark.law
def test_without_clamp_on_a_linear_network_it_is_guidance() -> None:
    matrix, positive, negative = heads(2, 8, 8), heads(0, 2, 5, 8), heads(1, 2, 5, 8)
    guided = nag(positive, negative, NagOptions(scale=4.0, tau=math.inf, alpha=1.0)) @ matrix
    cfg = negative @ matrix + 4.0 * (positive @ matrix - negative @ matrix)
    assert apart(guided, cfg) < 2e-5


@pytest.mark.pipe
@pytest.mark.parametrize("name", CROSS + JOINT)
def test_acts_on_every_family_in_one_call_a_step_and_leaves_no_trace(name: str) -> None:
    pipe = tiny(name)
    base = plain(pipe, name)
    with plug(pipe, NAG(until=0.0)), count_network(pipe) as count:
        blue = drawn(pipe, name, negative_prompt=OTHER)
        calls = count.calls
        alone = drawn(pipe, name)
        same = drawn(pipe, name, negative_prompt=tiny.inputs(name)["prompt"])
        green = drawn(pipe, name, negative_prompt="green star")
    assert calls == 2
    assert torch.equal(alone, base)
    assert apart(same, base) <= (0.0 if name in CROSS else 2e-6)
    assert apart(blue, base) > 1e-4 and apart(blue, green) > 1e-4
    assert torch.equal(plain(pipe, name), base)
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "flux", "z-image"])
def test_scale_1_is_the_plain_run_bit_for_bit(name: str) -> None:
    pipe = tiny(name)
    with plug(pipe, NAG(scale=1.0)), pytest.warns(UserWarning, match="off"):
        off = drawn(pipe, name, negative_prompt=OTHER)
    assert torch.equal(off, plain(pipe, name))


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "sd3", "qwenimage", "z-image", "pixart"])
def test_each_picture_has_its_own_negative_prompt(name: str) -> None:
    pipe = tiny(name)
    prompts, negatives = ["a red circle", "a cross"], [OTHER, "green star"]

    def made(prompt: Any, negative: Any, n: int, first: int = 0) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(first + i) for i in range(n)]
        prompt = (
            list(prompt) if isinstance(prompt, list) else prompt
        )  # Z-Image writes its template into lists
        return drawn(pipe, name, prompt=prompt, negative_prompt=negative, generator=seeds)

    with plug(pipe, NAG(until=0.0)):
        both = made(prompts, negatives, 2)
        alone = [made(prompts[i], negatives[i], 1, i) for i in (0, 1)]
    assert all(apart(both[i], alone[i][0]) < 2e-3 * float(alone[i].abs().max()) for i in (0, 1))
    assert apart(both[0], both[1]) > 1e-3


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "z-image", "flux"])
def test_pictures_per_prompt_share_its_negative(name: str) -> None:
    pipe = tiny(name)

    def made(**told: Any) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(4)]
        return drawn(pipe, name, generator=seeds, **told)

    prompts, negatives = ["a red circle", "a cross"], [OTHER, "green star"]
    with plug(pipe, NAG(until=0.0)):
        two_each = made(prompt=list(prompts), negative_prompt=negatives, num_images_per_prompt=2)
        four = made(
            prompt=[p for p in prompts for _ in "ab"], negative_prompt=[n for n in negatives for _ in "ab"]
        )
    assert apart(two_each, four) < 1e-4


@pytest.mark.pipe
def test_prompts_of_different_lengths_attend_to_all_of_their_own_tokens() -> None:
    pipe = tiny("sd15")
    long = torch.cat([pipe.encode_prompt(OTHER, "cpu", 1, False)[0]] * 2, 1)
    with plug(pipe, NAG()):
        once = drawn(pipe, "sd15", negative_prompt=OTHER)
        twice = drawn(pipe, "sd15", negative_prompt_embeds=long)
    assert apart(once, twice) < 1e-5  # attention to every token twice is attention to every token


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["sd15", "z-image"])
def test_embeddings_of_the_prompt_may_be_given(name: str) -> None:
    pipe = tiny(name)
    inputs = tiny.inputs(name)
    if name == "sd15":
        embeds = pipe.encode_prompt(inputs["prompt"], "cpu", 1, False)[0]
    else:
        embeds = pipe.encode_prompt(
            inputs["prompt"], do_classifier_free_guidance=False, max_sequence_length=16
        )[0]
    with plug(pipe, NAG(until=0.0)):
        words = drawn(pipe, name, negative_prompt=OTHER)
        given = drawn(pipe, name, prompt=None, prompt_embeds=embeds, negative_prompt=OTHER)
    assert apart(words, given) < 1e-5


@pytest.mark.pipe
def test_below_its_noise_level_the_network_runs_on_one_row() -> None:
    pipe = tiny("sd3")
    rows: list[int] = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["hidden_states"])), with_kwargs=True
    )
    with plug(pipe, NAG(until=0.8)):
        drawn(pipe, "sd3", negative_prompt=OTHER, num_inference_steps=4)
    assert rows == [2, 2, 1, 1]


@pytest.mark.pipe
def test_a_failed_run_leaves_nothing_behind() -> None:
    pipe = tiny("sd15")
    base = plain(pipe, "sd15")

    def fail(*told: Any) -> Any:
        raise RuntimeError("stop")

    with plug(pipe, NAG()):
        with pytest.raises(RuntimeError, match="stop"):
            drawn(pipe, "sd15", negative_prompt=OTHER, callback_on_step_end=fail)
        assert torch.equal(drawn(pipe, "sd15"), base)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"scale": 0.5}, "scale is 0.5"),
        ({"tau": 0.9}, "tau is 0.9"),
        ({"alpha": 1.5}, "alpha is 1.5, allowed is 0 to 1"),
        ({"until": -0.1}, "until is -0.1"),
        ({"strength": -1.0}, "strength is -1.0"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_options_out_of_range_are_refused(told: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NAG(**told)


@pytest.mark.pipe
def test_guidance_besides_is_refused() -> None:
    pipe = tiny("sd15")
    with (
        plug(pipe, NAG()),
        pytest.raises(ValueError, match=r"guidance_scale=5 together with NAG would guide twice"),
    ):
        drawn(pipe, "sd15", negative_prompt=OTHER, guidance_scale=5.0)
    flux = tiny("flux")
    with plug(flux, NAG()):
        drawn(flux, "flux", negative_prompt=OTHER, guidance_scale=3.5)  # an input of the network
        with pytest.raises(ValueError, match="true_cfg_scale=2"):
            drawn(flux, "flux", negative_prompt=OTHER, true_cfg_scale=2.0)


@pytest.mark.pipe
@pytest.mark.parametrize("name", ["auraflow", "cogvideox", "deepfloyd-if", "kandinsky22", "ddpm"])
def test_unknown_families_are_named_with_what_works_there(name: str) -> None:
    with pytest.raises(ValueError, match=r"method='cfg'|another family|no encode_prompt"):
        NAG().attach(tiny(name))


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("negative", "words"), [(3, "negative_prompt is 3"), (["a", "b"], "2 negative prompts for 1 prompts")]
)
def test_a_wrong_negative_prompt_is_refused(negative: Any, words: str) -> None:
    with plug(pipe := tiny("sd15"), NAG()), pytest.raises(ValueError, match=words):
        drawn(pipe, "sd15", negative_prompt=negative)


def test_presets_are_the_published_ones() -> None:
    flux, wan = PRESETS["FluxTransformer2DModel"], PRESETS["WanTransformer3DModel"]
    assert (flux.scale, flux.tau, flux.alpha) == (5.0, 2.5, 0.25)
    assert (wan.scale, wan.tau, wan.alpha) == (9.0, 2.5, 0.25)
    assert PRESETS["SD3Transformer2DModel"].alpha == 0.125
