"""Copies of a plugged pipeline, pipelines that share its scheduler, servers: each call gets its choice."""

from __future__ import annotations

import copy
import threading
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffplug.network.siblings import sibling
from diffplug.plug import plug
from diffplug.samplers import DCSolver, DCSolverScheduler, Solver, SolverScheduler
from diffplug.samplers.schedule import presets
from diffplug.testing import tiny

LOW, HIGH = (
    replace(presets.ddim(4, grid), meta={"guidance_scale": scale})
    for grid, scale in (("karras", 1.5), ("trailing", 7.5))
)
BOOK = {(4, 1.5): [1, 1, 0.9, 1.1], (4, 7.5): [1, 1, 1.2, 0.8]}


def call(pipe: Any, scale: float, **more: Any) -> Any:
    start = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent", **more}
    return pipe(**tiny.inputs("sd15", generator=start, **options))[0]


def used(pipe: Any, scale: float) -> list[float]:
    call(pipe, scale)
    made: Any = pipe.scheduler.schedule
    return (
        list(made.ratios)
        if isinstance(pipe.scheduler, DCSolverScheduler)
        else pipe.scheduler.timesteps.tolist()
    )


@pytest.mark.pipe
@pytest.mark.parametrize("one", [Solver([LOW, HIGH]), DCSolver(BOOK)], ids=["solver", "dc"])
def test_copies_choose_at_every_call_and_from_pipe_says_what_it_cannot(one: Any, tmp_path: Any) -> None:
    pipe = tiny("sd15")
    with plug(pipe, one), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        high, low = used(pipe, 7.5), used(pipe, 1.5)
        assert high != low
        before = dict(pipe.scheduler.config)
        copies = [copy.deepcopy(pipe), copy.copy(pipe)]
        for each in copies:
            assert used(each, 7.5) == high and used(each, 1.5) == low
        assert dict(pipe.scheduler.config) == before, "a call writes its choice into the configuration"
        other = StableDiffusionPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        pipe.scheduler.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="plug this very pipeline"):
            assert used(other, 7.5) == low
        other.scheduler = type(pipe.scheduler).from_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="plug this very pipeline"):
            assert used(other, 7.5) == low
        again = copy.copy(pipe)
        again.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert used(again, 7.5) == high
    assert used(copies[0], 7.5) == high
    with plug(copies[1]):
        pass
    assert "_diffplug_plugged" not in vars(pipe)


@pytest.mark.pipe
def test_a_polynomial_and_neutral_ratios_are_kept_by_files(tmp_path: Any) -> None:
    pipe = tiny("sd15")
    with plug(pipe, DCSolver({(4, 5.0): [1, 1, 0.9, 1.1]}, elsewhere="neutral")):
        pipe.scheduler.save_pretrained(tmp_path)
        loaded = DCSolverScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps(4)
    assert loaded.schedule.ratios == (1, 1, 0.9, 1.1)
    with pytest.warns(UserWarning, match="asked for 5.*run without compensation"):
        loaded.set_timesteps(5)
    with pytest.raises(ValueError, match="dc_ratios holds .'a'.: give one number per step"):
        DCSolverScheduler(dc_ratios={"a": 1})


@pytest.mark.pipe
def test_skip_coefficients_are_not_lost_in_silence() -> None:
    pipe = tiny("sd15")
    schedule = replace(presets.ddim(2), skips=(0.5, 0.5, 0.5, 0.5))
    with plug(pipe, Solver(schedule)):
        with_skips = call(copy.copy(pipe), 1.0, num_inference_steps=2)
        other = StableDiffusionPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        with pytest.warns(UserWarning, match="skip coefficients, which the plug Solver alone applies"):
            without = call(other, 1.0, num_inference_steps=2)
    assert not torch.equal(with_skips, without)


@pytest.mark.pipe
def test_a_server_takes_a_sibling_for_each_request() -> None:
    pipe = tiny("sd15")
    weights = {name: weight.data_ptr() for name, weight in pipe.unet.named_parameters()}

    def answer(scale: float) -> torch.Tensor:
        mine = sibling(pipe)
        with plug(mine, Solver([LOW, HIGH])):
            assert {n: w.data_ptr() for n, w in mine.unet.named_parameters()} == weights
            return torch.as_tensor(call(mine, scale))

    scales = [1.5, 7.5, 1.5, 7.5]
    alone, found = [answer(scale) for scale in scales], {}
    threads = [
        threading.Thread(target=lambda i=i, s=s: found.__setitem__(i, answer(s)))
        for i, s in enumerate(scales)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted) for i, wanted in enumerate(alone))


@pytest.mark.pipe
def test_another_thread_is_refused_inside_a_block() -> None:
    pipe, said = tiny("sd15"), []

    def other() -> None:
        try:
            call(pipe, 1.0)
        except ValueError as error:
            said.append(str(error))

    with plug(pipe, Solver()):
        thread = threading.Thread(target=other, name="second")
        thread.start()
        thread.join()
        call(pipe, 1.0)
    assert len(said) == 1 and "in a with block of thread 'MainThread'" in said[0]
    other()
    assert len(said) == 1


@pytest.mark.law
def test_a_schedule_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = SolverScheduler(schedules=[LOW, HIGH])
    scheduler.register_to_config(schedules=dict(scheduler.config.schedules))
    parsed: list[int] = []
    original = type(LOW).from_json
    monkeypatch.setattr(type(LOW), "from_json", lambda document: parsed.append(1) or original(document))
    with pytest.warns(UserWarning):
        for _ in range(3):
            scheduler.set_timesteps(4)
    assert len(parsed) == 2
