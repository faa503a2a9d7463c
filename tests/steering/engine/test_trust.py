"""What may go wrong in a steered call is told early, of the right one, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, TCDScheduler
from torch import Tensor

from diffplug import rewards
from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.steering import (
    SVDD,
    Beam,
    BestOfN,
    Churn,
    FeynmanKac,
    ImportanceSampling,
    Network,
    NoiseSearch,
    Resampling,
    Scoring,
    TwoLevel,
)
from diffplug.steering.engine.blame import failing_row
from diffplug.testing import tiny

pytestmark = pytest.mark.pipe


def red(images: Tensor, prompts: list[str]) -> Tensor:
    """Return the mean of red, magnified."""
    return 3000.0 * images[:, 0].mean((1, 2))


@pytest.fixture
def pipe() -> Any:
    """Return a tiny Stable Diffusion pipeline with a stochastic solver."""
    built = tiny("sd15")
    built.scheduler = EulerAncestralDiscreteScheduler.from_config(built.scheduler.config)
    return built


def run(pipe: Any, steerer: Any, prompt: Any = "a", **options: Any) -> Tensor:
    """Return the pictures of a short steered call."""
    given = {"num_inference_steps": 5, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    with plug(pipe, steerer):
        return torch.as_tensor(pipe(prompt, **{**given, **options}).images)


@pytest.mark.parametrize("kind", ["pt", "np"])
@pytest.mark.parametrize("steerer", [BestOfN, FeynmanKac])
def test_a_reward_may_write_into_its_pictures(pipe: Any, steerer: Any, kind: str) -> None:
    def spoiling(images: Tensor, prompts: list[str]) -> Tensor:
        scores = red(images, prompts)
        images.zero_()
        return scores

    kept = run(pipe, steerer(red, particles=3), output_type=kind)
    assert torch.equal(run(pipe, steerer(spoiling, particles=3), output_type=kind), kept)


def test_a_reward_with_exchanged_arguments_is_asked_by_name(pipe: Any) -> None:
    def exchanged(prompts: list[str], images: Tensor) -> Tensor:
        return red(images, prompts)

    assert torch.equal(run(pipe, BestOfN(exchanged, particles=3)), run(pipe, BestOfN(red, particles=3)))


class Unloadable:
    """A reward whose weights are missing."""

    def prepare(self) -> None:
        """Raise the error of a missing file."""
        raise ValueError("HPS: the file 'missing.pt' does not exist")

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Never be asked."""
        raise AssertionError("asked though it cannot be loaded")


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (Unloadable(), "the reward cannot be used here: HPS: the file 'missing.pt' does not exist"),
        (rewards.Weighted([red, Unloadable()], [1.0, 1.0]), "the file 'missing.pt' does not exist"),
        ("shapes", "the reward cannot be used here: .*lighthouse"),
    ],
)
def test_what_a_reward_lacks_is_told_before_the_network_runs(pipe: Any, reward: Any, told: str) -> None:
    with count_network(pipe) as count, pytest.raises(ValueError, match=told):
        run(pipe, BestOfN(reward, particles=2), "a lighthouse in a storm")
    assert count.calls == 0
    run(pipe, FeynmanKac(Unloadable(), particles=2, strength=0.0))  # never asked, never loaded


@pytest.mark.parametrize("bad", range(5))
def test_the_row_to_blame_is_found_by_halving(bad: int) -> None:
    asked: list[slice] = []

    def ask(rows: slice) -> None:
        asked.append(rows)
        if rows.start <= bad < rows.stop:
            raise RuntimeError("ink")

    assert failing_row(ask, 5, RuntimeError("ink")) == bad
    assert len(asked) <= 5


def test_nobody_is_blamed_for_the_scorer(pipe: Any) -> None:
    def always(rows: slice) -> None:
        raise RuntimeError("no connection")

    assert failing_row(always, 8, RuntimeError("no connection")) is None
    assert failing_row(always, 8, ConnectionError("gone")) is None
    asked: list[int] = []

    def leaving(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(images))
        raise SystemExit(0)

    with pytest.raises(ValueError, match="the reward failed at step 2 of 5: SystemExit: 0"):
        run(pipe, FeynmanKac(leaving, particles=2))
    assert asked == [2]


def test_a_reward_that_hangs_is_left_behind(pipe: Any) -> None:
    asked: list[int] = []

    def slow(images: Tensor, prompts: list[str]) -> Tensor:
        asked.append(len(images))
        time.sleep(5)
        return red(images, prompts)

    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"RewardTimeout: it gave no answer within 0\.2 s"):
        run(pipe, FeynmanKac(slow, particles=2, scoring=Scoring(timeout=0.2)))
    assert time.perf_counter() - start < 4 and asked == [2]
    kept = run(pipe, FeynmanKac(red, particles=2))
    assert torch.equal(run(pipe, FeynmanKac(red, particles=2, scoring=Scoring(timeout=60))), kept)


def test_a_reward_that_calls_its_own_pipeline_is_refused(pipe: Any) -> None:
    def recursive(images: Tensor, prompts: list[str]) -> Tensor:
        return pipe("again", num_inference_steps=2, output_type="pt").images.mean((1, 2, 3))

    with pytest.raises(ValueError, match="in a steered run already: a reward must not call the pipeline"):
        run(pipe, FeynmanKac(recursive, particles=2))
    assert type(pipe.scheduler) is EulerAncestralDiscreteScheduler


def test_another_thread_with_the_same_scheduler_is_refused_and_spoils_nothing_in_silence(pipe: Any) -> None:
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    told: list[str] = []

    def disturbing(images: Tensor, prompts: list[str]) -> Tensor:
        def call() -> None:
            try:
                other("b", num_inference_steps=2, output_type="pt")
            except ValueError as error:
                told.append(str(error))

        if not told:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        return red(images, prompts)

    with pytest.raises(ValueError, match="two threads use one EulerAncestralDiscreteScheduler"):
        run(pipe, FeynmanKac(disturbing, particles=2))
    assert len(told) == 1 and "two threads use one" in told[0]
    run(pipe, FeynmanKac(red, particles=2))


def test_latents_that_are_not_finite_end_the_run_and_single_ones_die(pipe: Any) -> None:
    spoil = [slice(0, 2)]

    def nan(module: Any, args: Any, output: Any) -> Any:
        output[0][spoil[0]] = torch.nan
        return output

    hook = pipe.unet.register_forward_hook(nan)
    try:
        with pytest.raises(ValueError, match="the latents are not finite at step 2 of 5.*less guidance"):
            run(pipe, FeynmanKac(red, particles=2), guidance_scale=1.0)
        spoil[0] = slice(0, 1)
        steerer = FeynmanKac(
            lambda images, prompts: [1.0] * len(images), particles=2, selection=Resampling(islands=1)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(pipe, steerer, guidance_scale=1.0)
        assert steerer.report is not None and steerer.report.invalid_rewards > 0
        assert steerer.report.rewards[0, 0, 0] == -torch.inf
    finally:
        hook.remove()


def test_finished_pictures_without_a_reward_are_told(pipe: Any) -> None:
    def partly(images: Tensor, prompts: list[str]) -> list[float]:
        return [float("nan"), 1.0, 2.0]

    with pytest.warns(UserWarning, match=r"1 of 3 finished pictures have a reward of NaN or \+inf"):
        run(pipe, BestOfN(partly, particles=3))


@pytest.mark.parametrize("most", [3, 1])
def test_out_of_memory_halves_rows_of_network_and_decoder_for_the_same_pictures(pipe: Any, most: int) -> None:
    steerer = FeynmanKac(red, particles=4, strength=5.0)
    kept = run(pipe, steerer, guidance_scale=4.0)
    forward, decode = pipe.unet.forward, pipe.vae.decode
    seen: list[int] = []

    def small(whole: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(args[0]))
        return whole(*args, **kwargs)

    pipe.unet.forward = lambda *args, **kwargs: small(forward, *args, **kwargs)
    pipe.vae.decode = lambda *args, **kwargs: small(decode, *args, **kwargs)
    try:
        again = run(pipe, steerer, guidance_scale=4.0)
    finally:
        del pipe.unet.forward, pipe.vae.decode
    torch.testing.assert_close(again, kept, rtol=0, atol=1e-4)
    assert max(seen) <= most
    assert "decode" not in vars(pipe.vae) and "forward" not in vars(pipe.unet)


def test_what_runs_out_of_memory_with_one_row_says_so(pipe: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe.unet.forward = full
    with pytest.raises(torch.OutOfMemoryError):
        run(pipe, BestOfN(red, particles=4))
    assert pipe.unet.forward is full


def test_pipelines_with_two_schedulers_are_refused_in_words() -> None:
    class Two:
        """Denoises twice."""

        def __init__(self) -> None:
            self.prior_scheduler, self.decoder_scheduler = DDIMScheduler(), DDIMScheduler()

    with pytest.raises(ValueError, match=r"2 schedulers \(decoder_scheduler, prior_scheduler\)"):
        BestOfN(red).attach(Two())


@pytest.mark.parametrize("make", [FeynmanKac, SVDD, TwoLevel, Beam])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipe: Any, make: Any) -> None:
    """The selections take their seeds from the attached `Seeds`, whatever the place in the call."""

    def last(first: int, n: int) -> Tensor:
        with plug(pipe, Seeds(first), make(red, particles=4)):
            images = pipe(["a red circle"] * n, num_inference_steps=5, output_type="pt").images
        return torch.as_tensor(images)[-1]

    torch.testing.assert_close(last(3, 2), last(4, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [FeynmanKac, SVDD, TwoLevel, Beam])
def test_a_deterministic_pipeline_just_works_and_the_report_says_how(make: Any) -> None:
    pipe = tiny("sd15")
    steerer = make(red, particles=4, returns="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with plug(pipe, steerer, DDIMScheduler):  # the scheduler is attached first
            images = pipe("a", num_inference_steps=5, output_type="pt").images
    assert len({np.asarray(image).tobytes() for image in images}) == 4
    words = "churn 1 at the scored calls, since DDIMScheduler adds none by itself"
    assert steerer.report.noise == words and f"  noise: {words}" in str(steerer.report)


def test_noise_follows_the_scheduler_and_its_eta(pipe: Any) -> None:
    steerer = FeynmanKac(red, particles=2)
    run(pipe, steerer)
    assert steerer.report is not None and steerer.report.noise == "the solver's own"
    for scheduler, options, words in (
        (DDIMScheduler, {"eta": 1.0}, "the solver's own"),
        (DDIMScheduler, {}, "churn 1 at the scored calls, since DDIMScheduler adds none by itself"),
        (TCDScheduler, {}, "eta=0.3, since TCDScheduler adds none by itself"),
        (TCDScheduler, {"eta": 0.5}, "the solver's own"),
    ):
        with plug(pipe, scheduler, steerer):
            pipe("a", num_inference_steps=4, output_type="pt", **options)
        assert steerer.report.noise == words


def test_a_proposal_that_cannot_be_is_refused_before_the_network_runs() -> None:
    pipe = tiny("lcm")
    with count_network(pipe) as count, pytest.raises(ValueError, match="LCMScheduler cannot be churned"):
        run(pipe, FeynmanKac(red, particles=2, proposal=Churn(0.5)))
    assert count.calls == 0
    pipe = tiny("sd15")
    with count_network(pipe) as count, pytest.raises(ValueError, match="DDIMScheduler adds no noise"):
        run(pipe, SVDD(red, particles=2, proposal=None))
    assert count.calls == 0


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ImportanceSampling(red, proposal=Churn()), "ImportanceSampling duplicates nothing"),
        (lambda: SVDD(red, scoring=Scoring(at="every")), "SVDD chooses the scored calls itself"),
        (lambda: BestOfN(red, scoring=Scoring(at=(0.5,))), "BestOfN chooses the scored calls itself"),
        (lambda: FeynmanKac(red, proposal="some"), "proposal='some': give Churn"),
        (lambda: FeynmanKac(red, scoring={"at": "every"}), r"scoring=\{'at': 'every'\}: give a Scoring"),
        (lambda: FeynmanKac(red, selection="ssp"), "selection='ssp': give a Resampling"),
        (lambda: Scoring(timeout=0), "timeout=0: give seconds above 0"),
        (lambda: Network(ranks="all"), "ranks='all': give True, False or Ranks"),
        (lambda: NoiseSearch(red, network=Network(ranks=True)), "runs in one process"),
    ],
)
def test_options_that_would_do_nothing_are_refused(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
