"""The denoiser's calls and rows are counted, and nothing of the counting stays behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffplug.network.denoiser import count_network, denoisers


class _Net(nn.Module):
    def forward(self, sample: torch.Tensor | list[torch.Tensor], timestep: int = 0) -> object:
        if timestep < 0:
            raise RuntimeError("a bad step")
        return sample


def test_calls_and_rows() -> None:
    pipe = SimpleNamespace(unet=_Net())
    with count_network(pipe) as count:
        pipe.unet(torch.zeros(3, 2), 1)
        pipe.unet(sample=torch.zeros(4, 2), timestep=1)
        pipe.unet([torch.zeros(2), torch.zeros(2)])
    assert (count.calls, count.rows) == (3, 9)
    assert count.seconds > 0


def test_nothing_is_counted_afterwards() -> None:
    pipe = SimpleNamespace(unet=_Net())
    with count_network(pipe) as count:
        pass
    pipe.unet(torch.zeros(1))
    assert count.calls == 0
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_hooks_go_also_after_an_exception() -> None:
    pipe = SimpleNamespace(unet=_Net())
    with pytest.raises(RuntimeError, match="a bad step"), count_network(pipe) as count:
        pipe.unet(torch.zeros(2), -1)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks
    assert (count.calls, count.rows) == (1, 2)


def test_counts_nest() -> None:
    pipe = SimpleNamespace(transformer=_Net())
    with count_network(pipe) as outer:
        pipe.transformer(torch.zeros(1))
        with count_network(pipe) as inner:
            pipe.transformer(torch.zeros(1))
    assert (outer.calls, inner.calls) == (2, 1)


def test_two_experts_count_together_and_shared_ones_once() -> None:
    net = _Net()
    pipe = SimpleNamespace(transformer=net, transformer_2=_Net(), unet=net)
    assert len(denoisers(pipe)) == 2
    with count_network(pipe) as count:
        pipe.transformer(torch.zeros(1))
        pipe.transformer_2(torch.zeros(1))
    assert count.calls == 2


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="no denoiser found in SimpleNamespace"),
        count_network(SimpleNamespace()),
    ):
        pass


@pytest.mark.pipe
def test_guidance_doubles_the_rows() -> None:
    from diffplug.testing import tiny

    pipe = tiny("sd15")
    with count_network(pipe) as count:
        pipe(["a", "b"], num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    assert count.calls == 2
    assert count.rows == 8
