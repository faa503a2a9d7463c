"""The network on a few rows at a time: the same pictures, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug.network.denoiser import denoisers
from diffplug.plug import plug
from diffplug.steering import BestOfN, FeynmanKac, Network, NoiseSearch
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red."""
    return images[:, 0].mean((1, 2))


def pictures(pipe: Any, family: str, steerer: Any) -> tuple[torch.Tensor, list[int]]:
    """Return the pictures of a steered call of two prompts, and the rows of every network call."""
    seen: list[int] = []
    network = denoisers(pipe)[0]
    own = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        seen.append(len(first))
        return own(*args, **kwargs)

    network.forward = forward
    given = tiny.inputs(family, num_inference_steps=2, prompt=["a", "b"])
    with plug(pipe, steerer):
        output = pipe(**{**given, "generator": torch.Generator().manual_seed(0)})
    assert network.forward is forward, "the forward of before is back"
    del network.forward
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images), seen


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "wan", "controlnet"])
def test_slices_change_nothing_but_rounding(family: str) -> None:
    options: dict[str, Any] = {"particles": 3, "returns": "all", "strength": 0.0}
    whole, rows = pictures(tiny(family), family, FeynmanKac(red, **options))
    parts, less = pictures(tiny(family), family, FeynmanKac(red, **options, network=Network(batch_size=4)))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)
    assert max(rows) > 4 >= max(less) and sum(rows) == sum(less)


def test_the_report_counts_the_network_as_before_and_searches_slice_too() -> None:
    steerer = NoiseSearch(red, particles=4, rounds=2, network=Network(batch_size=3))
    pictures(tiny("sd15"), "sd15", steerer)
    assert steerer.report is not None and steerer.report.network_calls == 2 * 2


def test_the_network_is_restored_after_an_error_and_sizes_are_checked() -> None:
    pipe = tiny("sd15")
    with pytest.raises(ValueError, match="network_batch_size=0"):
        BestOfN(red, network=Network(batch_size=0))
    steerer = BestOfN(lambda images, prompts: None, particles=2, network=Network(batch_size=1))
    with pytest.raises(ValueError, match="the reward failed"), plug(pipe, steerer):
        pipe("a", num_inference_steps=1)
    assert "forward" not in vars(pipe.unet)
    pipe.do_perturbed_attention_guidance = True
    with pytest.raises(ValueError, match="mixes rows in the network"), plug(pipe, steerer):
        pipe("a", num_inference_steps=1)
