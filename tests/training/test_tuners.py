"""Tuners: what moves, what the model was before, and files that Diffusers loads at the trained scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffplug.testing import tiny
from diffplug.training.conditions import encode
from diffplug.training.network import Network
from diffplug.training.noise_path import NoisePath
from diffplug.training.precision import autocast
from diffplug.training.tuners.extract import extract_lora, factors
from diffplug.training.tuners.full import FullTuner
from diffplug.training.tuners.lora import LoraTuner, lora_targets

INDEX = torch.tensor([700.0, 300.0])


def moved(tuner: Any, size: float = 0.05) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: value.detach() + size * torch.randn(value.shape, generator=generator)
        for name, value in tuner.parameters.items()
    }


def net_of(pipe: Any, tuner: Any) -> tuple[Network, Any, torch.Tensor]:
    form, told = encode(pipe, ["a", "b"])
    before = Network(pipe.unet, NoisePath.of(pipe.scheduler), form, tuner)
    tuner.attach(pipe.unet)
    return before, told, torch.randn(2, *form.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.law
@pytest.mark.parametrize("tuner", [FullTuner(), LoraTuner(rank=2)], ids=["full", "lora"])
def test_the_original_stays_what_it_was_and_any_weights_can_be_called(tuner: Any) -> None:
    pipe = tiny("sd15")
    form, told = encode(pipe, ["a", "b"])
    x = torch.randn(2, *form.shape)
    with torch.no_grad():
        first = pipe.unet(**form.arguments(x, INDEX - 1, told))[0]
    net, _, _ = net_of(pipe, tuner)
    other = moved(tuner)
    with torch.no_grad():
        assert torch.allclose(net(x, INDEX, told).eps, first, atol=1e-5)
        said = net(x, INDEX, told, other).eps
        with net.holding(other):
            assert torch.allclose(net(x, INDEX, told).eps, said, atol=1e-5)
            assert torch.allclose(net.original(x, INDEX, told).eps, first, atol=1e-5)
        assert torch.allclose(net(x, INDEX, told).eps, first, atol=1e-5)
    assert not torch.allclose(said, first, atol=1e-3)


@pytest.mark.law
def test_gradients_reach_the_weights_that_were_called_with_checkpointing_too() -> None:
    found = []
    for checkpointing in (False, True):
        pipe, tuner = tiny("sd15"), LoraTuner(rank=2)
        torch.manual_seed(0)
        net, told, x = net_of(pipe, tuner)
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        other = {name: value.requires_grad_() for name, value in moved(tuner).items()}
        net(x, INDEX, told, other).eps.square().sum().backward()
        assert all(value.grad is None for value in tuner.parameters.values())
        found.append([value.grad for value in other.values()])
        net(x, INDEX, told).eps.square().sum().backward()
        assert any(value.grad is not None for value in tuner.parameters.values())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.pipe
def test_a_lora_is_loaded_by_diffusers_at_the_scale_it_was_trained_with(tmp_path: Path) -> None:
    pipe, tuner = tiny("sd15"), LoraTuner(rank=4, alpha=2, save_dtype="float32")
    net, told, x = net_of(pipe, tuner)
    weights = moved(tuner)
    with torch.no_grad():
        said = net(x, INDEX, told, weights).eps
    saved = tuner.save(pipe, weights, tmp_path)
    assert saved == {"kind": "lora", "file": "adapter.safetensors"}
    other = tiny("sd15")
    other.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    config = next(iter(other.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (4, 2)
    fresh = Network(other.unet, net.path, net.form, tuner)
    with torch.no_grad():
        assert torch.allclose(fresh(x, INDEX, told).eps, said, atol=1e-5)
    for rank, alpha in ((4, 2), (6, 6)):
        again, larger = LoraTuner(rank=rank, alpha=alpha), tiny("sd15")
        again.attach(larger.unet)
        again.load(tmp_path / "adapter.safetensors")
        fresh = Network(larger.unet, net.path, net.form, again)
        with torch.no_grad():
            assert torch.allclose(fresh(x, INDEX, told).eps, said, atol=1e-5)
    whole, full = FullTuner(), tiny("sd15")
    whole.attach(full.unet)
    whole.load(tmp_path / "adapter.safetensors")
    with torch.no_grad():
        assert torch.allclose(
            Network(full.unet, net.path, net.form, whole)(x, INDEX, told).eps, said, atol=1e-5
        )


@pytest.mark.pipe
def test_an_extracted_lora_of_full_rank_is_the_student(tmp_path: Path) -> None:
    pipe, tuner = tiny("sd15"), FullTuner()
    net, told, x = net_of(pipe, tuner)
    names = {f"{name}.weight" for name in lora_targets(pipe.unet)}
    weights = {n: v if n in names else tuner.before[n] for n, v in moved(tuner, 0.01).items()}
    with torch.no_grad():
        said = net(x, INDEX, told, weights).eps
    found = extract_lora(pipe, tuner.before, weights, 1000, tmp_path, "float32")
    assert found["lost"] < 1e-5
    other = tiny("sd15")
    other.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    fresh = Network(other.unet, net.path, net.form, tuner)
    with torch.no_grad():
        assert torch.allclose(fresh(x, INDEX, told).eps, said, atol=1e-4)
    lost = [extract_lora(pipe, tuner.before, weights, rank, tmp_path)["lost"] for rank in (1, 2, 4)]
    assert lost == sorted(lost, reverse=True) and 0.01 < lost[2] < lost[0] < 1


@pytest.mark.law
def test_factors_are_the_closest_matrix_of_their_rank() -> None:
    change = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    down, up = factors(change, 2)
    assert down.shape == (2, 5, 3, 3) and up.shape == (6, 2, 1, 1)
    rest = change.flatten(1) - up.flatten(1) @ down.flatten(1)
    singular = torch.linalg.svdvals(change.flatten(1))
    assert float(rest.square().sum()) == pytest.approx(float(singular[2:].square().sum()), rel=1e-4)


@pytest.mark.pipe
def test_all_weights_are_saved_and_taken_up_again(tmp_path: Path) -> None:
    pipe, tuner = tiny("sd15"), FullTuner(save_dtype="float32")
    tuner.attach(pipe.unet)
    weights = moved(tuner)
    assert tuner.save(pipe, weights, tmp_path)["kind"] == "denoiser"
    again, other = FullTuner(), tiny("sd15")
    again.attach(other.unet)
    again.load(tmp_path / "denoiser.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in again.parameters.items())
    with safe_open(tmp_path / "denoiser.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(pipe.unet.state_dict())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe = tiny("sd15")
    tuner, full = LoraTuner(rank=2), FullTuner()
    tuner.attach(pipe.unet)
    tuner.save(pipe, tuner.parameters, tmp_path)
    other = LoraTuner(rank=1)
    other.attach(tiny("sd15").unet)
    with pytest.raises(ValueError, match="does not fit this adapter of rank 1"):
        other.load(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="is no safetensors file: only those are read"):
        other.load(tmp_path / "adapter.ckpt")
    full.attach(tiny("sd15").unet)
    with pytest.raises(ValueError, match="is no safetensors file"):
        full.load(tmp_path / "model.ckpt")
    save_file({"x": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="belongs to another model"):
        full.load(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"no layer of UNet2DConditionModel ends in 'to_w'"):
        lora_targets(pipe.unet, ["to_w"])
    with pytest.raises(ValueError, match="rank must be a whole number"):
        LoraTuner(rank=0)


@pytest.mark.law
def test_bfloat16_is_put_on_and_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("sd15")
    form, told = encode(pipe, ["a", "b"])
    x = torch.randn(2, *form.shape)
    stock = {type(p) for p in pipe.unet.attn_processors.values()}
    with torch.no_grad():
        exact = pipe.unet(**form.arguments(x, INDEX - 1, told))[0]
        with autocast(pipe.unet, torch.bfloat16):
            rough = pipe.unet(**form.arguments(x, INDEX - 1, told))[0]
        again = pipe.unet(**form.arguments(x, INDEX - 1, told))[0]
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, atol=0.05) and torch.equal(again, exact)
    assert "forward" not in vars(pipe.unet) and {type(p) for p in pipe.unet.attn_processors.values()} == stock
