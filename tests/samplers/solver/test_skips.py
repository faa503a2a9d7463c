"""Skip coefficients: applied to what the decoder is handed, in the encoder's order, during a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from diffplug import plug
from diffplug.samplers import Solver
from diffplug.samplers.schedule.presets import ddim
from diffplug.samplers.solver.unet_skip_scale import scaled_skips, skip_count
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe


def seen(pipe: Any, skips: Any) -> list[torch.Tensor]:
    """What the decoder's blocks are handed in one evaluation, in the order of the encoder."""
    found: list[torch.Tensor] = []
    unet = pipe.unet
    hooks = []
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, 8, 8, generator=g)
    text = torch.randn(1, 4, unet.config.cross_attention_dim, generator=g)
    with scaled_skips(pipe, skips):
        for block in unet.up_blocks:
            hooks.append(
                block.register_forward_pre_hook(
                    lambda _, __, kwargs: found.__setitem__(slice(0, 0), kwargs["res_hidden_states_tuple"]),
                    with_kwargs=True,
                )
            )
        unet(x, 10, text)
    for hook in hooks:
        hook.remove()
    return found


def test_each_connection_has_its_own_coefficient() -> None:
    pipe = tiny("sd15")
    count = skip_count(pipe.unet)
    plain = seen(pipe, None)
    assert len(plain) == count == 4
    first = [0.5] + [1.0] * (count - 1)
    torch.testing.assert_close(seen(pipe, first)[0], 0.5 * plain[0], rtol=0, atol=0)
    last = [1.0] * (count - 1) + [0.25]
    scaled = seen(pipe, last)
    torch.testing.assert_close(scaled[-1], 0.25 * plain[-1], rtol=0, atol=0)
    torch.testing.assert_close(scaled[0], plain[0], rtol=0, atol=0)


def test_the_plug_applies_them_and_leaves_no_trace() -> None:
    pipe, inputs = tiny("sd15"), tiny.inputs("sd15", num_inference_steps=3)
    count = skip_count(pipe.unet)
    schedule = ddim(3, "linspace")

    def picture(skips: Any) -> torch.Tensor:
        with plug(pipe, Solver(replace(schedule, skips=skips))):
            return pipe(**inputs, generator=torch.Generator().manual_seed(1)).images

    plain = picture(None)
    assert not torch.equal(picture((0.9,) * count), plain)
    assert torch.equal(picture((1.0,) * count), plain) and torch.equal(picture(None), plain)
    assert not any(block._forward_pre_hooks for block in pipe.unet.up_blocks)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_another_number_of_connections_is_refused(name: str) -> None:
    pipe = tiny(name)
    with (
        pytest.raises(ValueError, match="3 skip coefficients, .*Pipeline has"),
        scaled_skips(pipe, (0.9,) * 3),
    ):
        pass
