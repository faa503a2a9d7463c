"""Siblings: the same weights, and nothing else in common, whatever is plugged into one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffplug.loading import load
from diffplug.network.denoiser import count_network
from diffplug.network.siblings import sibling
from diffplug.plug import plug
from diffplug.samplers import NAG, FewStep, Solver
from diffplug.samplers.schedule import presets
from diffplug.sara import SaRAWeights, SparseDelta, load_sara, unload_sara
from diffplug.seeds import Seeds
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe


def networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def picture(pipe: Any, seed: int = 0, **more: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": 4, "output_type": "latent", **more}
    return torch.as_tensor(
        pipe("a red circle", generator=torch.Generator().manual_seed(seed), **arguments)[0]
    )


def delta_of(module: nn.Module) -> SparseDelta:
    """A delta that moves the first entries of the first convolution by 1."""
    from diffplug.sara.delta import Delta

    shape = tuple(dict(module.named_parameters())["conv_in.weight"].shape)
    delta = Delta(shape, torch.arange(8, dtype=torch.int32), torch.ones(8))
    return SparseDelta({"unet": {"conv_in.weight": delta}})


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3", "ddpm", "wan", "qwenimage"])
def test_weights_are_shared_and_modules_schedulers_and_tokenizers_are_not(name: str) -> None:
    pipe = tiny(name)
    twin = sibling(pipe)
    assert type(twin) is type(pipe) and twin.config.get("_name_or_path") == pipe.config.get("_name_or_path")
    for part, one in pipe.components.items():
        assert one is None or getattr(twin, part) is not one or not callable(one), part
    for part, network in networks(pipe).items():
        other = getattr(twin, part)
        assert all(a is b for a, b in zip(network.parameters(), other.parameters(), strict=True))
        assert all(a is b for a, b in zip(network.buffers(), other.buffers(), strict=True))
        assert not {*map(id, network.modules())} & {*map(id, other.modules())}
    if name != "ddpm":
        with plug(pipe, Seeds(0)), pytest.raises(ValueError, match="Seeds is plugged in"):
            sibling(pipe)


SKIPS = Solver(replace(presets.ddim(4), skips=(0.5,) * 6))


@pytest.mark.parametrize(
    "made",
    [
        lambda pipe: FewStep("shapes", steps=4, merge="fuse"),
        lambda pipe: FewStep("shapes", steps=4, merge="runtime"),
        lambda pipe: NAG(5.0),
        lambda pipe: SKIPS,
        lambda pipe: SaRAWeights(delta_of(pipe.unet)),
    ],
    ids=["fused", "adapter", "nag", "skips", "sara"],
)
def test_what_is_plugged_into_one_is_not_in_the_other(made: Callable[[Any], Any]) -> None:
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    before = picture(pipe)
    twin = sibling(pipe)
    with plug(twin, made(twin)):
        inside = picture(twin, negative_prompt="red", guidance_scale=1.0)
        assert torch.equal(picture(pipe), before)
        with plug(pipe, made(pipe)):
            assert torch.equal(picture(pipe, negative_prompt="red", guidance_scale=1.0), inside)
        assert torch.equal(picture(pipe), before)
    assert torch.equal(picture(twin), before) and not torch.equal(inside, before)
    weights = zip(pipe.unet.parameters(), twin.unet.parameters(), strict=True)
    assert all(one is other for one, other in weights)


def test_threads_get_the_pictures_that_they_would_get_alone() -> None:
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    twin, found = sibling(pipe), {True: [], False: []}

    def go(plugged: bool) -> None:
        for seed in range(4):
            mine = twin if plugged else pipe
            with plug(mine, *([FewStep("shapes", steps=4)] if plugged else [])):
                found[plugged].append(picture(mine, seed, **({} if plugged else {"num_inference_steps": 6})))

    for plugged in (True, False):
        go(plugged)
    threads = [threading.Thread(target=go, args=(plugged,)) for plugged in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pictures in found.values():
        assert len(pictures) == 8
        assert all(torch.equal(one, other) for one, other in zip(pictures[:4], pictures[4:], strict=True))


def test_a_delta_that_was_on_before_comes_off_one_sibling_alone() -> None:
    pipe = tiny("sd15")
    plain = picture(pipe)
    load_sara(pipe, delta_of(pipe.unet), name="style")
    styled = picture(pipe)
    twin = sibling(pipe)
    unload_sara(twin, "style")
    assert torch.equal(picture(twin), plain) and torch.equal(picture(pipe), styled)
    unload_sara(pipe, "style")
    assert torch.equal(picture(twin), plain) and torch.equal(picture(pipe), plain)
    assert not torch.equal(plain, styled)


def test_weights_that_are_tied_stay_tied_in_copies() -> None:
    from diffplug.network.shared_weights import own_weights, twins

    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    (twin,) = twins({"network": network})[0].values()
    undo = own_weights(twin)
    assert twin[1].weight is twin[0].weight is not network[0].weight
    assert torch.equal(twin[0].weight, network[0].weight)
    undo()
    assert twin[1].weight is twin[0].weight is network[0].weight
    own_weights(nn.Linear(2, 2))()  # where nothing is shared, nothing is done


def test_copies_that_were_cast_are_kept_where_the_pipeline_is() -> None:
    pipe = tiny("sd15")
    twin = sibling(pipe)
    undo = plug(twin, SaRAWeights(delta_of(twin.unet)))
    twin.unet.to(torch.bfloat16)
    undo()
    assert {value.dtype for value in twin.unet.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in pipe.unet.parameters()} == {torch.float32}


def test_a_compiled_network_is_shared_whole_and_told() -> None:
    pipe = tiny("sd15")
    pipe.unet.compile()  # nothing is compiled before the first call
    with pytest.warns(UserWarning, match="unet: compiled or under hooks of offloading, so siblings share it"):
        twin = sibling(pipe)
    assert twin.unet is pipe.unet and twin.vae is not pipe.vae


def test_counts_of_a_network_that_threads_share_are_of_ones_own() -> None:
    pipe = tiny("sd15")
    twin = sibling(pipe)
    twin.unet = pipe.unet
    other = threading.Thread(target=lambda: picture(twin, num_inference_steps=3))
    with count_network(pipe) as count:
        other.start()
        other.join()
        picture(pipe, num_inference_steps=2)
    assert count.calls == 2
