"""Best of n is the plain pipeline plus a choice at the end."""

from __future__ import annotations

import pytest
import torch

from diffplug.plug import plug
from diffplug.steering import BestOfN
from diffplug.testing import tiny


def dark(images: torch.Tensor, prompts: list[str]) -> list[float]:
    """Return minus the mean brightness."""
    return [-float(image.mean()) for image in images]


@pytest.mark.pipe
def test_the_best_free_picture_comes_back_with_a_deterministic_solver() -> None:
    pipe = tiny("sd15")
    given = tiny.inputs("sd15")
    plain = pipe(**given, num_images_per_prompt=4, generator=torch.Generator().manual_seed(1)).images
    steerer = BestOfN(dark, particles=4)
    with plug(pipe, steerer):
        best = pipe(**given, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(best[0], plain[int(torch.tensor(dark(plain, [])).argmax())])
    assert steerer.report.calls == ()
    assert steerer.report.final_log_weights.tolist() == [[0.0] * 4]
    assert steerer.report.network_calls == 2


@pytest.mark.pipe
def test_another_schedule_in_the_middle_is_steered_too() -> None:
    """The steerer stands at the scheduler that the pipeline has when it is called."""
    pipe = tiny("sd15")
    steerer = BestOfN(dark, particles=2)
    with plug(pipe, steerer):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        assert len(pipe(**tiny.inputs("sd15")).images) == 1
    assert steerer.report.steps == 2


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="returns='sample' would ignore the reward"):
        BestOfN(dark, returns="sample")
    with pytest.raises(ValueError, match="particles=0"):
        BestOfN(dark, particles=0)
