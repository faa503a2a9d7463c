"""A picture is the same alone and in a batch, whatever the family and the solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffplug.intercept import StepCall, StepInterceptor, intercept_call, intercept_step
from diffplug.plug import plug
from diffplug.seeds import Seeds, generators, particle_seed, picture_seeds, row_seeds
from diffplug.testing import tiny

PROMPTS = ["a red circle", "blue square", "green"]


class Particles:
    """A plug that asks for `k` rows per prompt, as a steerer does, and returns them all."""

    def __init__(self, k: int) -> None:
        self.k = k

    def attach(self, pipe: Any) -> Callable[[], None]:
        def around(call: Any, kwargs: dict[str, Any]) -> Any:
            return call(**{**kwargs, "num_images_per_prompt": self.k})

        return intercept_call(pipe, around)


def run(pipe: Any, name: str, *plugs: Any, **changes: Any) -> torch.Tensor:
    """The latents (or pixels) that a call ends with."""
    output = {} if name == "ddpm" else {"output_type": "latent"}
    with plug(pipe, *plugs):
        return torch.as_tensor(pipe(**{**tiny.inputs(name, num_inference_steps=3), **output, **changes})[0])


def stochastic(pipe: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)


def sde(pipe: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")


CASES: list[tuple[str, Callable[[Any], Any]]] = [
    ("sd15", lambda pipe: DDPMScheduler),
    ("sd15", lambda pipe: EulerAncestralDiscreteScheduler),
    ("sdxl", sde),
    ("lcm", lambda pipe: pipe.scheduler),
    ("sd3", stochastic),
    ("flux", stochastic),
    ("wan", sde),
    ("pixart", sde),
]


def plain_network(pipe: Any) -> Any:
    """The pipeline with a denoiser whose arithmetic cannot depend on the batch, as matrix products may."""

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        learned_variance = type(pipe).__name__.startswith("PixArt")
        return (torch.cat([0.3 * x, x], 1) if learned_variance else 0.3 * x,)

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.forward = forward
    return pipe


@pytest.mark.law
@pytest.mark.parametrize(("name", "make"), CASES)
def test_alone_and_in_a_batch_of_three_to_the_bit(name: str, make: Callable[[Any], Any]) -> None:
    pipe = plain_network(tiny(name))
    scheduler = make(pipe)
    together = run(pipe, name, scheduler, Seeds([5, 6, 9]), prompt=PROMPTS)
    assert torch.equal(together, run(pipe, name, scheduler, Seeds([5, 6, 9]), prompt=PROMPTS))
    for prompt, seed, picture in zip(PROMPTS, (5, 6, 9), together, strict=True):
        alone = run(pipe, name, scheduler, Seeds(seed), prompt=prompt)
        assert torch.equal(alone[0], picture)
    assert not torch.equal(alone, run(pipe, name, scheduler, Seeds(10), prompt=prompt))


@pytest.mark.pipe
@pytest.mark.parametrize(("name", "make"), CASES)
def test_alone_and_in_a_batch_with_the_network(name: str, make: Callable[[Any], Any]) -> None:
    pipe = tiny(name)
    scheduler = make(pipe)
    together = run(pipe, name, scheduler, Seeds([5, 6, 9]), prompt=PROMPTS)
    alone = run(pipe, name, scheduler, Seeds(6), prompt=PROMPTS[1])[0]
    assert (alone - together[1]).abs().max() <= 1e-4 * alone.abs().max()


@pytest.mark.pipe
def test_steps_differ_from_picture_to_picture() -> None:
    """The noise of the steps is seeded too: the same start, another seed, another picture."""
    pipe = tiny("flux")
    start = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    two = run(pipe, "flux", stochastic(pipe), Seeds(1), num_images_per_prompt=2, latents=start.clone())
    plain = run(pipe, "flux", Seeds(1), num_images_per_prompt=2, latents=start.clone())
    assert not torch.equal(two[0], two[1]) and torch.equal(plain[0], plain[1])


@pytest.mark.pipe
def test_pictures_are_counted_in_slot_order() -> None:
    pipe = plain_network(tiny("sd15"))
    four = run(pipe, "sd15", DDPMScheduler, Seeds(5), prompt=PROMPTS[:2], num_images_per_prompt=2)
    listed = run(
        pipe, "sd15", DDPMScheduler, Seeds((5, 6, 7, 8)), prompt=PROMPTS[:2], num_images_per_prompt=2
    )
    assert torch.equal(four, listed)
    third = run(pipe, "sd15", DDPMScheduler, Seeds(7), prompt=PROMPTS[1])
    assert torch.equal(four[2], third[0])


@pytest.mark.pipe
def test_seeds_equal_the_pipelines_own_generators() -> None:
    pipe = tiny("sd15")
    ours = run(pipe, "sd15", DDPMScheduler, Seeds(5), prompt=PROMPTS)
    theirs = run(pipe, "sd15", DDPMScheduler, prompt=PROMPTS, generator=generators(5, n=3))
    assert torch.equal(ours, theirs)
    ours = run(tiny("ddpm"), "ddpm", Seeds(5), batch_size=3, num_inference_steps=3)
    theirs = run(tiny("ddpm"), "ddpm", batch_size=3, num_inference_steps=3, generator=generators(5, n=3))
    assert torch.equal(ours, theirs)


@pytest.mark.pipe
@pytest.mark.parametrize("seeds_first", [True, False])
def test_a_steerers_particles_follow_from_the_pictures(seeds_first: bool) -> None:
    pipe = plain_network(tiny("flux"))
    plugs = [Seeds([5, 9]), Particles(3)]
    if not seeds_first:
        plugs.reverse()
    rows = run(pipe, "flux", stochastic(pipe), *plugs, prompt=PROMPTS[:2])
    assert len(rows) == 6
    for prompt, seed, row in zip(PROMPTS, (5, 9), (0, 3), strict=False):
        alone = run(pipe, "flux", stochastic(pipe), Seeds(seed), prompt=prompt)
        assert torch.equal(rows[row], alone[0])
        alone = run(pipe, "flux", stochastic(pipe), Seeds(particle_seed(seed, 2)), prompt=prompt)
        assert torch.equal(rows[row + 2], alone[0])


@pytest.mark.pipe
def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    pipe = tiny("sd3")
    state = torch.get_rng_state()
    run(pipe, "sd3", stochastic(pipe), Seeds(5))
    assert torch.equal(state, torch.get_rng_state())


def test_whoever_stands_at_the_step_sees_the_generators() -> None:
    pipe, seen = tiny("sd3"), []

    class Watch(StepInterceptor):
        def on_step(self, call: StepCall) -> Any:
            seen.append(call.kwargs.get("generator"))
            return call.run()

    with plug(pipe, Seeds(5)):
        undo = intercept_step(pipe.scheduler, Watch())
        pipe(**tiny.inputs("sd3"))
        undo()
    assert [[g.initial_seed() for g in gens] for gens in seen] == [[5]] * 2


def test_undone_exactly_and_refused_with_a_sentence() -> None:
    pipe = tiny("sd15")
    cls, scheduler_cls, keys = type(pipe), type(pipe.scheduler), set(vars(pipe))
    for words, changes in (
        ("Seeds gives every picture its own", {"generator": torch.Generator()}),
        ("2 seeds were given for 3 pictures: give 3", {"prompt": PROMPTS}),
    ):
        with pytest.raises(ValueError, match=words):
            run(pipe, "sd15", Seeds([1, 2]), **changes)
        assert (type(pipe), type(pipe.scheduler)) == (cls, scheduler_cls) and set(vars(pipe)) == keys
    with pytest.raises(ValueError, match="Seeds and Seeds both claim the pipeline's seeds"):
        plug(pipe, Seeds(1), Seeds(2))


@pytest.mark.parametrize("bad", [-1, 2**63, 1.5, "7", True, None, [1, 2.5], [-3]])
def test_bad_seeds_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="A seed is an integer from 0"):
        Seeds(bad)


@pytest.mark.law
def test_seeds_of_rows() -> None:
    assert picture_seeds(3, 2) == [3, 4] and picture_seeds((7, 7)) == [7, 7]
    assert [g.initial_seed() for g in generators(3, n=3)] == [3, 4, 5]
    assert row_seeds([1, 2, 3, 4], prompts=2, rows=4) == [1, 2, 3, 4]
    assert row_seeds([1, 2], prompts=2, rows=4) == [1, particle_seed(1, 1), 2, particle_seed(2, 1)]
    assert row_seeds([1, 2], prompts=1, rows=3) == [1, 2, particle_seed(1, 1)]
    many = row_seeds(list(range(50)), prompts=50, rows=50 * 20)
    assert len(set(many)) == len(many) and min(many) >= 0 and max(many) < 2**63
    with pytest.raises(ValueError, match="do not fit a batch of 3 rows"):
        row_seeds([1, 2], prompts=2, rows=3)
