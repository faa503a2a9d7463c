"""`apply` and `restore` are `plug` and its undo, without a block."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import diffplug
from diffplug.testing import tiny


def test_names_and_plugs_add_up_and_come_off() -> None:
    pipe = tiny("sd15")
    before, kind = dict(pipe.components), type(pipe)
    assert diffplug.apply(pipe, "dpm++@karras") is pipe
    assert pipe.scheduler.config.solver == "dpm++"
    diffplug.apply(pipe, diffplug.seeds.Seeds(3))
    first = pipe(**tiny.inputs("sd15", num_inference_steps=3))[0]
    assert torch.equal(first, pipe(**tiny.inputs("sd15", num_inference_steps=3))[0])
    assert diffplug.restore(pipe) is pipe
    assert type(pipe) is kind and all(pipe.components[name] is part for name, part in before.items())
    diffplug.restore(pipe)  # nothing is left to do


def test_what_is_refused_leaves_the_pipeline_alone() -> None:
    pipe = tiny("sd15")
    before = pipe.scheduler
    with pytest.raises(ValueError, match="got nothing to plug"):
        diffplug.apply(pipe)
    with pytest.raises(ValueError, match="unknown sampler 'euler-b'"):
        diffplug.apply(pipe, "euler-b")
    diffplug.apply(pipe, "euler")
    with pytest.raises(ValueError, match="both claim the pipeline's scheduler"):
        diffplug.apply(pipe, DDIMScheduler)
    diffplug.restore(pipe)
    assert pipe.scheduler is before


def test_a_copy_is_not_restored_with_its_original() -> None:
    pipe = tiny("sd15")
    diffplug.apply(pipe, "euler")
    other = copy.copy(pipe)
    diffplug.restore(other)
    assert isinstance(other.scheduler, EulerDiscreteScheduler)
    diffplug.restore(pipe)
    assert not isinstance(pipe.scheduler, EulerDiscreteScheduler)
