"""A person's call becomes the call that runs k particles per prompt, whatever form its arguments have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffplug.steering.engine.generators import child_seeds, spread_generators
from diffplug.steering.engine.request import read_request
from diffplug.steering.engine.slots import Slots


class Images:
    """A pipeline that counts images per prompt."""

    def __call__(
        self,
        prompt: Any = None,
        prompt_embeds: Any = None,
        negative_prompt: Any = None,
        num_images_per_prompt: int = 1,
        latents: Any = None,
        generator: Any = None,
        output_type: str = "pil",
    ) -> None:
        """Do nothing."""


class Unconditional:
    """A pipeline with a batch size and no prompt."""

    def __call__(self, batch_size: int = 1, output_type: str = "pil") -> None:
        """Do nothing."""


class Plain:
    """A pipeline that knows prompts only."""

    def __call__(self, prompt: Any = None, negative_prompt: Any = None, output_type: str = "np") -> None:
        """Do nothing."""


class ImageToImage:
    """A pipeline that starts from images."""

    def __call__(
        self, prompt: Any = None, image: Any = None, strength: float = 0.8, num_images_per_prompt: int = 1
    ) -> None:
        """Do nothing."""


def seeded(*seeds: int) -> list[torch.Generator]:
    """Return CPU generators with these seeds."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_count_per_prompt_is_raised() -> None:
    request = read_request(Images(), {"prompt": ["a", "b"], "num_images_per_prompt": 2}, Slots(8))
    assert (request.groups, request.wanted, request.prompts) == (2, 2, ("a", "b"))
    assert request.kwargs == {"prompt": ["a", "b"], "num_images_per_prompt": 8}
    assert request.output_type == "pil"


def test_pipelines_without_prompts_get_a_larger_batch() -> None:
    request = read_request(Unconditional(), {"batch_size": 3, "output_type": "np"}, Slots(4))
    assert (request.groups, request.wanted, request.prompts) == (1, 3, ("",))
    assert request.kwargs["batch_size"] == 4
    assert request.output_type == "np"


def test_without_a_count_prompts_are_repeated() -> None:
    given = {"prompt": ["a", "b"], "negative_prompt": "ugly"}
    request = read_request(Plain(), given, Slots(2))
    assert request.kwargs == {"prompt": ["a", "a", "b", "b"], "negative_prompt": ["ugly"] * 4}
    assert given["prompt"] == ["a", "b"]


def test_given_embeddings_are_repeated_here_and_not_by_the_pipeline() -> None:
    embeds = torch.arange(6.0).reshape(2, 3, 1)
    request = read_request(Images(), {"prompt_embeds": embeds, "num_images_per_prompt": 2}, Slots(3))
    assert (request.groups, request.wanted, request.prompts) == (2, 2, None)
    assert request.kwargs["num_images_per_prompt"] == 1
    assert torch.equal(request.kwargs["prompt_embeds"], embeds.repeat_interleave(3, 0))


def test_generators_are_spread_over_particles() -> None:
    given = seeded(3, 4)
    states = [g.get_state() for g in given]
    spread = spread_generators(given, 2, 4)
    assert spread[0] is given[0]
    assert spread[4] is given[1]
    assert len({g.initial_seed() for g in spread}) == 8
    assert all(torch.equal(g.get_state(), state) for g, state in zip(given, states, strict=True))
    again = spread_generators(seeded(3, 4), 2, 4)
    assert [g.initial_seed() for g in again] == [g.initial_seed() for g in spread]
    full = seeded(*range(8))
    assert spread_generators(full, 2, 4) == full
    mixed = spread_generators(seeded(1, 2, 3, 4), 2, 3)
    assert [g.initial_seed() for g in mixed[:2]] == [1, 2]
    assert [g.initial_seed() for g in mixed[3:5]] == [3, 4]


def test_child_seeds_follow_the_state_of_their_parent() -> None:
    parent = seeded(7)[0]
    first = child_seeds(parent, 3)
    assert child_seeds(parent, 3) == first
    torch.rand(1, generator=parent)
    assert child_seeds(parent, 3) != first


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"prompt": "a", "num_images_per_prompt": 9},
            "only 4 particles are run: raise particles to at least 9",
        ),
        ({"prompt": ["a", "b"], "latents": torch.zeros(2, 4, 8, 8)}, "start from 8"),
        ({"prompt": ["a", "b"], "generator": seeded(1, 2, 3)}, "3 generators for 2 prompts"),
        ({"prompt": "a", "generator": seeded(1, 2, 3, 4, 5)}, "5 generators for 1 prompts"),
        ({}, "neither prompt nor prompt_embeds"),
    ],
)
def test_what_does_not_fit_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_request(Images(), kwargs, Slots(4))


def test_latents_for_every_particle_are_kept() -> None:
    latents = torch.zeros(8, 4, 8, 8)
    request = read_request(Images(), {"prompt": ["a", "b"], "latents": latents}, Slots(4))
    assert torch.equal(request.kwargs["latents"], latents)


def test_each_start_image_stays_with_its_prompt() -> None:
    request = read_request(ImageToImage(), {"prompt": ["a", "b"], "image": ["x", "y"]}, Slots(2))
    assert request.kwargs["image"] == ["x", "x", "y", "y"]
    shared = torch.zeros(1, 3, 8, 8)
    request = read_request(ImageToImage(), {"prompt": ["a", "b"], "image": shared}, Slots(2))
    assert request.kwargs["image"] is shared


def test_the_size_is_the_calls_or_the_pipelines_own() -> None:
    class Videos:
        scheduler = None

        def __call__(
            self, prompt: Any = None, height: int = 480, width: Any = None, num_frames: int = 9
        ) -> None:
            """Make a video."""

    request = read_request(Videos(), {"prompt": "a", "num_frames": 17}, Slots(2))
    assert request.size == {"height": 480, "width": None, "num_frames": 17}
    assert read_request(Images(), {"prompt": "a"}, Slots(2)).size["height"] is None


def test_control_pictures_are_repeated_where_prompts_are() -> None:
    given = {"prompt_embeds": torch.zeros(2, 3, 4), "image": ["x", "y"]}
    assert read_request(Images(), given, Slots(2)).kwargs["image"] == ["x", "x", "y", "y"]
    assert read_request(Images(), {"prompt": ["a", "b"], "image": ["x", "y"]}, Slots(2)).kwargs["image"] == [
        "x",
        "y",
    ]
    several = Images()
    several.controlnet = SimpleNamespace(nets=[1, 2])
    given["image"] = [["x", "y"], "depth of both"]
    assert read_request(several, given, Slots(2)).kwargs["image"][0] == ["x", "x", "y", "y"]


def test_generators_of_a_prompt_must_differ() -> None:
    same = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)]
    with pytest.raises(ValueError, match="two generators of prompt 0 have the same state"):
        spread_generators(same, 1, 4)
    assert len(spread_generators(same, 2, 2)) == 4  # one for each of two prompts
    assert spread_generators([same[0], same[0]], 1, 2) == [same[0], same[0]]  # it moves on between draws
