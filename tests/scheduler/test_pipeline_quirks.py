"""Arguments that pipelines lose: the table against every pipeline of the installed Diffusers."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from diffplug.scheduler.pipeline_quirks import QUIRKS, lost_arguments
from diffplug.testing import tiny
from diffplug.testing.swallowed_arguments import pipeline_calls, swallowed_arguments

pytestmark = pytest.mark.contract

NODES = [1.0, 0.9, 0.6, 0.2]


def test_the_table_is_what_the_installed_diffusers_does() -> None:
    spec = find_spec("diffusers")
    assert spec is not None and spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "pipelines"
    read = dict(pipeline_calls(folder))
    assert len(read) > 250
    found = {name: swallowed_arguments(call) for name, call in read.items()}
    listed = {name: {arg: quirk.kind for arg, quirk in quirks.items()} for name, quirks in QUIRKS.items()}
    assert {name: lost for name, lost in found.items() if lost} == listed


def lost(source: str) -> dict[str, str]:
    body = "\n    ".join(source.strip().splitlines())
    call = ast.parse(f"def __call__(self, sigmas=None, num_images_per_prompt=1):\n    {body}").body[0]
    assert isinstance(call, ast.FunctionDef)
    return swallowed_arguments(call)


USED = "self.prepare_latents(batch * num_images_per_prompt)\n"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("retrieve_timesteps(self.scheduler, sigmas=sigmas)", {}),
        ("if sigmas is None:\n    sigmas = default()\nset_timesteps(sigmas)", {}),
        ("given = sigmas or default()\nself.scheduler.set_timesteps(given)", {}),
        ("x = 3", {"sigmas": "unread"}),
        ("self.check_inputs(sigmas)", {"sigmas": "unread"}),
        ("self.check_inputs(sigmas)\nsigmas = [1.0]\nset_timesteps(sigmas)", {"sigmas": "overwritten"}),
        ("if self.scheduler.config.x:\n    sigmas = None\nset_timesteps(sigmas)", {"sigmas": "branch"}),
        ("n = len(sigmas)\nself.scheduler.set_timesteps(5)", {"sigmas": "not set"}),
    ],
)
def test_the_reader_of_sources_knows_the_ways_to_lose_an_argument(source: str, found: dict[str, str]) -> None:
    assert lost(USED + source) == found


def test_a_count_that_start_noise_does_not_follow_is_found() -> None:
    use = "set_timesteps(sigmas)\nembeds = self.encode(prompt, num_images_per_prompt)\n"
    assert lost(use + "self.prepare_latents(batch_size)") == {"num_images_per_prompt": "latents"}
    assert lost(use + "self.prepare_latents(embeds.shape[0])") == {}


def evaluations(pipe: Any, **changes: Any) -> int:
    calls: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *given: calls.append(1))
    pipe(**tiny.inputs("flux", **changes), generator=torch.Generator().manual_seed(0))
    hook.remove()
    return len(calls)


def test_a_condition_on_the_scheduler_is_asked_of_the_scheduler() -> None:
    pipe = tiny("flux")
    unipc = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert lost_arguments(pipe) == {} and evaluations(pipe, sigmas=NODES) == 4
    assert lost_arguments(pipe, unipc) == {"sigmas": "is set to None where the scheduler has use_flow_sigmas"}
    pipe.scheduler = unipc
    assert list(lost_arguments(pipe)) == ["sigmas"] and evaluations(pipe, sigmas=NODES) == 2
    assert lost_arguments(tiny("sd15")) == {}
