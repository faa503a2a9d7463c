"""The laws of steerers: what anything that selects particles has to hold to be trusted on a pipeline.

    check_steerer(MySteerer)                                 all laws; AssertionError names the law that broke
    check_steerer(lambda reward, **options: MySteerer(reward, patience=3, **options))
    @pytest.mark.parametrize("law", STEERER_LAWS, ids=lambda law: law.__name__)

A steerer is built as `make(reward, particles=, returns=, strength=, seed=)`, with those of the options that
`make` takes; `returns` is "best" or "all". The laws run it on a tiny random Stable Diffusion pipeline on the
CPU, a second or two for each.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from diffplug.plug import plug
from diffplug.testing.tiny import tiny

PARTICLES = 4
STEPS = 5
PROMPTS = ("a red circle", "a blue square")
ROUNDING = 1e-4  # of pictures in [0, 1]: rows of one batch may be added up in another order
Reward = Callable[[Tensor, list[str]], Any]


@dataclass(frozen=True)
class Subject:
    """A steerer class or factory under test, with the pipeline that it is tested on."""

    make: Callable[..., Any]
    name: str

    def new(self, reward: Reward, **options: Any) -> Any:
        """Return a fresh steerer, given those of the options that it takes."""
        options = {"particles": PARTICLES, "strength": 1.0, **options}
        return self.make(reward, **{key: value for key, value in options.items() if self.takes(key)})

    def takes(self, option: str) -> bool:
        """Return whether the steerer has this option."""
        parameters = inspect.signature(self.make).parameters
        return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @cached_property
    def pipe(self) -> Any:
        """Return a tiny pipeline with a stochastic solver."""
        pipe = tiny("sd15")
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        return pipe

    def run(self, steerer: Any, prompts: Iterable[str] = PROMPTS, **options: Any) -> Tensor:
        """Return the pictures of a steered call, `[n, 3, h, w]`."""
        with warnings.catch_warnings(), plug(self.pipe, steerer) as pipe:
            warnings.simplefilter("ignore")
            return call(pipe, prompts, **options)

    def plain(self, prompts: Iterable[str] = PROMPTS, **options: Any) -> Tensor:
        """Return the pictures of the unsteered call with as many copies as there are particles."""
        return call(self.pipe, prompts, num_images_per_prompt=PARTICLES, **options)


Law = Callable[[Subject], None]


def check_steerer(make: Callable[..., Any], laws: Iterable[Law] | None = None) -> None:
    """Run the laws (default: all of `STEERER_LAWS`) on a steerer class or on a factory `make(reward,
    **options)`.

    Raises AssertionError that names the steerer and the law, also when the steerer itself raises.
    """
    subject = Subject(make, getattr(make, "__name__", type(make).__name__))
    for law in STEERER_LAWS if laws is None else laws:
        try:
            law(subject)
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{subject.name} breaks the law {law.__name__!r}: {reason}") from error


# ---- calls and rewards -------------------------------------------------------------------------------------


def call(pipe: Any, prompts: Iterable[str], seed: int = 0, **options: Any) -> Tensor:
    """Return the pictures of a guided call with its own start noise."""
    prompts = list(prompts)
    common = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt"}
    options.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(prompts, **common, **options).images


def red(images: Tensor, prompts: list[str]) -> Tensor:
    """Return a reward that tells a tiny pipeline's pictures apart: the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


class Raising:
    """A reward that gives `red` for a while and then raises."""

    def __init__(self, good_calls: int) -> None:
        self.left = good_calls

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return `red`, or raise."""
        self.left -= 1
        if self.left < 0:
            raise OSError("the scorer went away")
        return red(images, prompts)


# ---- laws --------------------------------------------------------------------------------------------------


def weight_zero_is_unsteered(subject: Subject) -> None:
    """With strength 0 the particles are the plain pipeline's pictures, bit for bit, and the reward is never
    asked.
    """
    if not subject.takes("strength"):
        return
    images = subject.run(subject.new(Raising(0), strength=0.0, returns="all"))
    assert torch.equal(images, subject.plain()), "strength 0 changes the pictures"


def constant_reward_changes_nothing(subject: Subject) -> None:
    """A reward that likes everything equally leaves every particle bit for bit where it was."""
    images = subject.run(subject.new(lambda images, prompts: [0.3] * len(images), returns="all"))
    assert torch.equal(images, subject.plain()), "a constant reward changes the pictures"


def runs_repeat(subject: Subject) -> None:
    """Two calls in a row with the same seeds give the same pictures; nothing is left over from the first."""
    steerer = subject.new(red)
    first = subject.run(steerer)
    assert torch.equal(first, subject.run(steerer)), "the second call differs from the first"


def groups_do_not_mix(subject: Subject) -> None:
    """Two prompts in one call give what two calls give, each slot with its own generator and each prompt with
    its own stream.
    """

    def streams(group: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(100 * group + slot) for slot in range(PARTICLES)]

    together = subject.run(subject.new(red, returns="all", seed=5), generator=[*streams(0), *streams(1)])
    alone = [
        subject.run(subject.new(red, returns="all", seed=5 + g), [PROMPTS[g]], generator=streams(g))
        for g in (0, 1)
    ]
    error = float((together - torch.cat(alone)).abs().max())
    assert error < ROUNDING, f"two prompts in one call differ from two calls by {error:.2g}"


def the_dead_do_not_return(subject: Subject) -> None:
    """A particle whose reward is NaN or -inf is not handed back while another one is left."""

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        scores = red(images, prompts).reshape(-1, PARTICLES)
        scores[:, 1], scores[:, 2] = math.nan, -math.inf
        return scores.reshape(-1)

    every = subject.run(subject.new(reward, returns="all"), [PROMPTS[0]])
    best = subject.run(subject.new(reward), [PROMPTS[0]], num_images_per_prompt=2)
    expected = every[[0, 3]][torch.argsort(red(every[[0, 3]], []), descending=True)]
    assert torch.equal(best, expected), "a picture with an invalid reward is handed back"


def best_comes_first(subject: Subject) -> None:
    """As many pictures come back as were asked for, those with the best rewards, in falling order, prompt by
    prompt.
    """
    every = subject.run(subject.new(red, returns="all"))
    best = subject.run(subject.new(red), num_images_per_prompt=2)
    assert len(best) == 2 * len(PROMPTS), f"{len(best)} pictures for {len(PROMPTS)} prompts with 2 each"
    for group in range(len(PROMPTS)):
        population = every[group * PARTICLES :][:PARTICLES]
        order = torch.argsort(red(population, []), descending=True, stable=True)[:2]
        assert torch.equal(best[2 * group :][:2], population[order]), (
            "the pictures are not the two best in falling order"
        )


def copies_keep_their_history(subject: Subject) -> None:
    """With a deterministic multistep solver every picture is one that the plain pipeline draws too.

    Copies of a particle then run on the same path; with another particle's history they leave it. A steerer
    that refuses solvers without noise holds this law too.
    """
    stochastic = subject.pipe.scheduler
    subject.pipe.scheduler = DPMSolverMultistepScheduler.from_config(stochastic.config, solver_order=2)
    try:
        plain = subject.plain()
        # noise would lead elsewhere, and later rounds of a search start elsewhere
        steered = subject.run(subject.new(red, returns="all", rounds=1, proposal=None))
    except ValueError as error:
        assert "no noise" in str(error), f"a deterministic solver fails: {error}"
        return
    finally:
        subject.pipe.scheduler = stochastic
    nearest = (steered[:, None] - plain[None]).abs().flatten(2).amax(-1).amin(-1)
    assert float(nearest.max()) < ROUNDING, "a copied particle lost the solver's history of its ancestor"


def plug_and_undo(subject: Subject) -> None:
    """Once the plug is taken off, pipeline and scheduler are the objects and the classes they were."""
    pipe = subject.pipe
    before = (type(pipe), pipe.scheduler, type(pipe.scheduler), set(vars(pipe)), dict(pipe.scheduler.config))
    plain = subject.plain()
    subject.run(subject.new(red))
    after = (type(pipe), pipe.scheduler, type(pipe.scheduler), set(vars(pipe)), dict(pipe.scheduler.config))
    assert before == after, "the pipeline is not what it was"
    assert set(vars(pipe.scheduler)) == _attributes(pipe, subject), (
        "the scheduler has other attributes than before"
    )
    assert torch.equal(plain, subject.plain()), "the plain pipeline draws other pictures than before"


def _attributes(pipe: Any, subject: Subject) -> set[str]:
    """Return the attributes of a scheduler of the same kind after a run that nobody steered."""
    fresh = tiny("sd15")
    fresh.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    call(fresh, PROMPTS)
    return set(vars(fresh.scheduler))


def restored_after_a_failing_reward(subject: Subject) -> None:
    """A reward that raises stops the call with a ValueError; the pipeline then works as before, and so does
    the steerer.
    """
    plain, expected = subject.plain(), subject.run(subject.new(red))
    try:
        subject.run(subject.new(Raising(0)))
    except ValueError as error:
        assert "the scorer went away" in str(error), f"the error hides the reason: {error}"
    else:
        raise AssertionError("a reward that raises goes unnoticed")
    assert torch.equal(plain, subject.plain()), "the plain pipeline draws other pictures than before"
    assert torch.equal(expected, subject.run(subject.new(red))), "steering draws other pictures than before"


def steering_helps(subject: Subject) -> None:
    """Over a few seeds the pictures handed back have a better mean reward than the unsteered ones."""
    steered = torch.cat([subject.run(subject.new(red, seed=s), seed=s) for s in range(4)])
    plain = torch.cat([subject.plain(seed=s) for s in range(4)])
    gain = float(red(steered, []).mean() - red(plain, []).mean())
    assert gain > 0, f"the mean reward changed by {gain:.3g}"


STEERER_LAWS: tuple[Law, ...] = (
    weight_zero_is_unsteered,
    constant_reward_changes_nothing,
    runs_repeat,
    groups_do_not_mix,
    the_dead_do_not_return,
    best_comes_first,
    copies_keep_their_history,
    plug_and_undo,
    restored_after_a_failing_reward,
    steering_helps,
)
