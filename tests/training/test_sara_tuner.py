"""SaRA and peft's tuners in the trainers: gradients, weights of one's own, files, and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy import FORM, VP, Denoiser

from diffplug.testing import tiny
from diffplug.training.conditions import Conditions
from diffplug.training.config import settings
from diffplug.training.network import Network
from diffplug.training.tuners.by_name import check_tuner, tuner_of
from diffplug.training.tuners.peft_tuner import PeftTuner
from diffplug.training.tuners.sara.tuner import SaraTuner
from diffplug.training.tuners.settings import PEFT_KINDS, TunerSettings

pytestmark = pytest.mark.contract


def _network() -> tuple[Network, SaraTuner]:
    torch.manual_seed(0)
    denoiser, tuner = Denoiser(), SaraTuner(TunerSettings(kind="sara", density=0.3))
    tuner.attach(denoiser)
    return Network(denoiser, VP, FORM, tuner), tuner


def _rows() -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, generator=generator)
    return x, torch.tensor([100.0, 300, 500, 700, 900, 999]), Conditions({"told": torch.ones(6, 2)})


def test_weights_of_ones_own_act_and_learn_as_its_own_do() -> None:
    network, _ = _network()
    rows = _rows()
    copies = network.copies()
    network(*rows).x0.square().mean().backward()
    network(*rows, copies).x0.square().mean().backward()
    for name, value in network.weights.items():
        assert torch.allclose(value.grad, copies[name].grad, rtol=1e-5, atol=1e-8)  # type: ignore[arg-type]
    moved = {name: (value + 0.1).detach() for name, value in copies.items()}
    told = network(*rows, moved).x0.detach()
    before = network(*rows).x0.detach()
    with network.holding(moved):
        assert torch.allclose(network(*rows).x0, told, atol=1e-6)
    assert torch.equal(network(*rows).x0, before)
    network.put(moved)
    assert torch.equal(network.original(*rows).x0, before)
    assert torch.allclose(network(*rows).x0, told, atol=1e-6)


def test_asking_the_original_between_forward_and_backward_is_safe() -> None:
    network, tuner = _network()
    rows = _rows()
    network.put({name: value + 0.1 for name, value in network.weights.items()})
    network(*rows).x0.square().mean().backward()
    wanted = [entry.vector.grad.clone() for entry in tuner.sara.entries]  # type: ignore[union-attr]
    for entry in tuner.sara.entries:  # type: ignore[union-attr]
        entry.vector.grad = None
    loss = network(*rows).x0.square().mean()
    network.original(*rows)
    loss.backward()
    got = [entry.vector.grad for entry in tuner.sara.entries]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_the_file_of_sara_is_read_again(tmp_path: Path) -> None:
    told = TunerSettings(kind="sara", density=0.05, save_dtype="float32")
    pipe, tuner = tiny("sd15"), SaraTuner(told)
    tuner.attach(pipe.unet)
    weights = {name: value.detach() + 0.1 for name, value in tuner.parameters.items()}
    saved = tuner.save(pipe, weights, tmp_path)
    assert saved == {"kind": "sara", "file": "adapter.sara.safetensors"}
    again, other = SaraTuner(told), tiny("sd15")
    again.attach(other.unet)
    again.load(tmp_path / saved["file"])
    assert all(torch.allclose(v, weights[n], atol=1e-6) for n, v in again.parameters.items())
    smaller = SaraTuner(TunerSettings(kind="sara", density=0.02))
    smaller.attach(tiny("sd15").unet)
    with pytest.raises(ValueError, match=r"same tuner\.density"):
        smaller.load(tmp_path / saved["file"])


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_peft_tuners_begin_as_nothing_and_end_in_a_file(kind: str, tmp_path: Path) -> None:
    pipe = tiny("sd15")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500.0])
    states = torch.randn(1, 4, pipe.unet.config.cross_attention_dim)
    before = pipe.unet(x, t, states)[0].detach()
    tuner: Any = tuner_of(TunerSettings(kind=kind, rank=4))
    tuner.attach(pipe.unet)
    assert torch.allclose(pipe.unet(x, t, states)[0], before, atol=1e-4)
    out = pipe.unet(x, t, states)[0]
    out.square().mean().backward()
    assert any(value.grad is not None for value in tuner.parameters.values())
    weights = {n: v.detach() + 0.02 * torch.randn(v.shape) for n, v in tuner.parameters.items()}
    with torch.no_grad():
        for name, value in tuner.parameters.items():
            value.copy_(weights[name])
    tuned = pipe.unet(x, t, states)[0].detach()
    assert not torch.allclose(tuned, before, atol=1e-4)
    with tuner.original():
        assert torch.allclose(pipe.unet(x, t, states)[0], before, atol=1e-4)
    tuner.save_dtype = "float32"
    saved = tuner.save(pipe, weights, tmp_path)
    assert saved["kind"] == "peft"
    from diffplug.samplers.few_step.catalogue import Row, Weights
    from diffplug.samplers.few_step.checkpoint import install

    told = Weights(file=saved["file"], component="unet")
    row = Row(
        name="x",
        family="sd15",
        kind="peft",
        weights=(told,),
        steps=(4,),
        licence="unknown",
        source="here",
        folder=str(tmp_path),
    )
    fresh = tiny("sd15")
    _, undo = install(row, fresh)
    assert torch.allclose(fresh.unet(x, t, states)[0], tuned, atol=1e-4)
    undo()
    assert torch.equal(fresh.unet(x, t, states)[0], before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "lorra"}, "Did you mean 'lora'"),
        ({"kind": "lora", "density": 0.1}, "would do nothing with lora"),
        ({"kind": "sara", "density": 1.5}, "at most 1"),
        ({"kind": "sara", "targets": ["to_q"]}, "tuner.include"),
        ({"kind": "full", "targets": ["to_q"]}, "everything moves"),
        ({"kind": "sara", "extract": 4}, "extract is for"),
        ({"densty": 0.1}, "Did you mean 'tuner.density'"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as told:
        settings(TunerSettings, values, "tuner")
    assert "\n" not in str(told.value)


def test_names_are_checked_before_any_work() -> None:
    denoiser = tiny("sd15").unet
    with pytest.raises(ValueError, match="unknown tensor or block 'down_block'"):
        check_tuner(TunerSettings(kind="sara", include=("down_block",)), denoiser)
    check_tuner(TunerSettings(kind="sara", include=("down_blocks", "*.attn2.*")), denoiser)
    with pytest.raises(ValueError, match="no layer"):
        check_tuner(TunerSettings(kind="oft", targets=("to_x",)), denoiser)
    with pytest.raises(ValueError, match="unknown tuner of peft"):
        PeftTuner("ofd")
