"""Deltas on models: exact on, exact off, in any order; and models that they do not belong on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffplug
from diffplug.sara import (
    SaRAWeights,
    SparseDelta,
    from_supertuning,
    load_delta,
    load_sara,
    loaded_sara,
    merge_sara,
    read_published,
    sara_to_checkpoint,
    save_delta,
    set_sara_scale,
    to_supertuning,
    unload_sara,
)
from diffplug.testing import tiny
from diffplug.training import SaRA, SaRAAdamW

pytestmark = pytest.mark.law


def _model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 48), nn.Linear(48, 8))


def _trained(
    seed: int, density: float = 0.1, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, SparseDelta]:
    """A tuned copy of the model, and what it learnt."""
    model = _model().to(dtype)
    optimizer = SaRAAdamW({"unet": model}, lr=3e-2, density=density, **options)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        x = torch.randn(4, 4, 4, 4, generator=generator).to(dtype)
        (model(x) - seed).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = optimizer.tuner.delta()
    optimizer.tuner.detach()
    return model, delta


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.named_parameters()}


def _same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, state[n]) for n, v in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_and_off_to_the_bit(dtype: torch.dtype, layout: torch.memory_format, tmp_path: Path) -> None:
    tuned, delta = _trained(1, dtype=dtype)
    file = save_delta(delta, tmp_path / "a", dtype="float32")
    model = _model().to(dtype).to(memory_format=layout)
    before = _state(model)
    assert load_sara(model, file) == "a" and loaded_sara(model) == {"a": 1.0}
    assert _same(model, _state(tuned))
    set_sara_scale(model, 0.0)
    assert _same(model, before)
    set_sara_scale(model, {"a": 0.7})
    for _, name, one in delta.entries():
        now = dict(model.named_parameters())[name].detach().reshape(-1)[one.index.long()]
        wanted = before[name].reshape(-1)[one.index.long()].float() + torch.tensor(0.7) * one.values
        assert torch.allclose(now, wanted.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2)
    unload_sara(model)
    assert _same(model, before) and loaded_sara(model) == {} and "_diffplug_sara" not in vars(model)


def test_order_does_not_matter() -> None:
    one, other = _trained(1)[1], _trained(2, density=0.2)[1]
    model, start = _model(), _state(_model())
    load_sara(model, one, 0.6, "a")
    load_sara(model, other, 0.5, "b")
    first = _state(model)
    unload_sara(model, "a")
    unload_sara(model)
    load_sara(model, other, 0.5, "b")
    load_sara(model, one, 0.6, "a")
    assert _same(model, first)
    unload_sara(model, "b")
    alone = _model()
    load_sara(alone, one, 0.6, "a")
    assert _same(model, _state(alone))
    unload_sara(model, "a")
    assert _same(model, start)


def test_a_model_that_is_moved_to_another_precision() -> None:
    delta = _trained(1)[1]
    model = _model()
    load_sara(model, delta, name="a")
    model.bfloat16()
    set_sara_scale(model, 0.5)
    unload_sara(model)
    assert _same(model, _state(_model().bfloat16()))


def test_a_published_progression_saves_all_it_learnt() -> None:
    tuned, delta = _trained(1, progressive=2)
    model = _model()
    load_sara(model, delta)
    assert _same(model, _state(tuned))


def test_as_a_plug_on_a_pipeline(tmp_path: Path) -> None:
    pipe, learner = tiny("sd15"), tiny("sd15")
    before = _state(pipe.unet)
    tuner = SaRA({"unet": learner.unet, "text_encoder": learner.text_encoder}, density=0.05)
    with torch.no_grad():
        for vector in tuner.parameters():
            vector.add_(0.1)
    file = tuner.save(tmp_path / "style")
    with tuner.original():
        assert _same(learner.unet, before)

    def drawn() -> Any:
        return pipe(**tiny.inputs("sd15"), generator=torch.Generator().manual_seed(0))[0]

    plain = drawn()
    with diffplug.plug(pipe, SaRAWeights(file, scale=0.8), SaRAWeights(file, scale=0.1)) as plugged:
        assert loaded_sara(plugged) == {"style": 0.8, "style-2": 0.1}
        assert not _equal(drawn(), plain)
    assert _same(pipe.unet, before) and _equal(drawn(), plain)
    assert "scale=0.5" in repr(SaRAWeights(file, 0.5))


def _equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(torch.as_tensor(one), torch.as_tensor(other)))


# ------------------------------------------------------------------------------------------------ refusals


def test_another_base_is_refused_or_warned_of() -> None:
    delta = _trained(1)[1]
    with pytest.raises(ValueError, match="not the model that the delta was trained on"):
        load_sara(_model(5), delta)
    with pytest.warns(UserWarning, match="not the model"):
        load_sara(_model(5), delta, any_base=True)
    for dtype in (torch.bfloat16, torch.float16):  # the same base in another precision
        load_sara(_model().to(dtype), delta)


def test_what_fits_no_model_leaves_it_alone() -> None:
    delta = _trained(1)[1]
    model = _model()
    before = _state(model)
    odd = SparseDelta(
        {"unet": {**delta.components["unet"], "2.weigth": delta.components["unet"]["2.weight"]}}
    )
    with pytest.raises(ValueError, match=r"unknown tensor of Sequential '2.weigth'.*'2.weight'"):
        load_sara(model, odd)
    wide = SparseDelta({"unet": {"2.weight": delta.components["unet"]["0.weight"]}})
    with pytest.raises(ValueError, match="belongs to another model"):
        load_sara(model, wide)
    with pytest.raises(ValueError, match="unknown component 'unet'"):
        load_sara({"transformer": model}, delta)
    for scale in (float("nan"), "1", True):
        with pytest.raises(ValueError, match="scale is"):
            load_sara(model, delta, scale)  # type: ignore[arg-type]
    model[2].merged = True
    with pytest.raises(ValueError, match="unfuse_lora"):
        load_sara(model, delta)
    model[2].merged = False
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        load_sara(meta, delta)
    model.add_module("3", nn.Linear(48, 8, dtype=torch.float32))
    model[3].weight = nn.Parameter(torch.zeros(8, 48, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        load_sara(model, delta)
    assert torch.equal(model[2].weight, before["2.weight"])


def test_names() -> None:
    model, delta = _model(), _trained(1)[1]
    load_sara(model, delta, name="style")
    with pytest.raises(ValueError, match="loaded already"):
        load_sara(model, delta, name="style")
    with pytest.raises(ValueError, match="Did you mean 'style'"):
        set_sara_scale(model, {"stile": 1.0})
    with pytest.raises(ValueError, match="unknown SaRA delta"):
        unload_sara(model, "other")
    with pytest.raises(ValueError, match="no SaRA delta is loaded"):
        set_sara_scale(_model(), 0.5)
    for scale in (float("nan"), "1"):
        with pytest.raises(ValueError, match="give a finite number"):
            SaRAWeights(delta, scale=scale)  # type: ignore[arg-type]


def test_a_plug_whose_delta_was_taken_off_inside() -> None:
    model, delta = _model(), _trained(1)[1]
    before = _state(model)
    undo = SaRAWeights(delta).attach(model)
    unload_sara(model)
    undo()
    assert _same(model, before)


def test_two_tuners_on_one_model_are_refused() -> None:
    model = _model()
    first = SaRA(model, density=0.1)
    with pytest.raises(ValueError, match="another SaRA trains"):
        SaRA(model, density=0.1)
    first.detach()
    SaRA(model, density=0.1).detach()
    with pytest.raises(ValueError, match=r"as pipe\.unet"):
        SaRA(tiny("sd15"))


def test_a_delta_and_a_tuner_do_not_share_a_model() -> None:
    delta = _trained(1)[1]
    model = _model()
    before = _state(model)
    tuner = SaRA(model, density=0.1)
    for put_on in (lambda: load_sara(model, delta), lambda: load_sara(model, delta, any_base=True)):
        with pytest.raises(ValueError, match=r"a SaRA trains this unet.*detach\(\) first"):
            put_on()
    tuner.detach()
    name = load_sara(model, delta)
    with pytest.raises(ValueError, match=r"a SaRA delta is on this \w+: call unload_sara\(\) first"):
        SaRA(model, density=0.1)
    unload_sara(model, name)
    assert _same(model, before)
    SaRA(model, density=0.1).detach()


def test_weights_that_something_else_has_changed_are_not_undone() -> None:
    model, delta = _model(), _trained(1)[1]
    load_sara(model, delta, name="style")
    with torch.no_grad():
        model[2].weight.add_(1e-3)  # as a fused LoRA does
    for change in (unload_sara, lambda m: set_sara_scale(m, 0.5), lambda m: load_sara(m, delta, name="b")):
        with pytest.raises(ValueError, match="a LoRA was fused"):
            change(model)


# ----------------------------------------------------------------------------------- merging and converting


def test_merging() -> None:
    one, other = _trained(1)[1], _trained(2)[1]
    model, both = _model(), _model()
    load_sara(model, merge_sara([one, other], [0.6, 0.5]))
    load_sara(both, one, 0.6, "a")
    load_sara(both, other, 0.5, "b")
    for name, value in model.named_parameters():
        assert torch.allclose(value, dict(both.named_parameters())[name], atol=1e-7)
    for method in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        merged = merge_sara([one, other], method=method, density=0.5)
        values = torch.cat([d.values for _, _, d in merged.entries()])
        assert 0.2 < float((values == 0).double().mean()) < 0.8
        again = merge_sara([one, other], method=method, density=0.5)
        assert torch.equal(values, torch.cat([d.values for _, _, d in again.entries()]))
        load_sara(_model(), merged)
    for bad, message in (
        ({"sources": [one]}, "two deltas or more"),
        ({"sources": [one, other], "weights": [1.0]}, "a weight each"),
        ({"sources": [one, other], "method": "tise"}, "Did you mean 'ties'"),
        ({"sources": [one, other], "method": "ties", "density": 0.0}, "density must be above 0"),
        ({"sources": [one, other], "density": 0.1}, "would do nothing with method='sum'"),
        ({"sources": [one, other], "weights": [1.0, float("nan")]}, "finite"),
        ({"sources": "a.sara.safetensors"}, "is one file"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_sara(**bad)  # type: ignore[arg-type]


def test_as_a_dense_checkpoint(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    pipe = tiny("sd15")
    before = _state(pipe.unet)
    tuner = SaRA({"unet": pipe.unet}, density=0.05)
    with torch.no_grad():
        for vector in tuner.parameters():
            vector.mul_(2)
    delta = tuner.delta()
    tuner.detach()
    tuned = _state(pipe.unet)
    for entry in tuner.entries:
        entry.restore()
    (file,) = sara_to_checkpoint(pipe, delta, tmp_path)
    assert file.parent == tmp_path / "unet" and _same(pipe.unet, before)
    assert _same(UNet2DConditionModel.from_pretrained(tmp_path / "unet"), tuned)
    sara_to_checkpoint(_model(), _trained(1)[1], tmp_path)
    model = _model()
    load_sara(model, _trained(1)[1])
    from safetensors.torch import load_file

    assert all(
        torch.equal(v, _state(model)[n])
        for n, v in load_file(tmp_path / "unet" / "model.safetensors").items()
    )


def test_supertuning_there_and_back(tmp_path: Path) -> None:
    from peft import PeftModel

    delta = _trained(1, per_layer=True)[1]
    left = to_supertuning(delta, _model(), tmp_path / "peft")
    assert left == ["0.weight"]
    model, base = _model(), _model()
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft")
    load_sara(
        model, SparseDelta({"unet": {n: d for n, d in delta.components["unet"].items() if n != "0.weight"}})
    )
    x = torch.randn(2, 4, 4, 4)
    assert torch.allclose(adapted(x), model(x), atol=1e-6)
    back = from_supertuning(tmp_path / "peft", _model())
    for _, name, one in back.entries():
        assert torch.equal(one.index, delta.components["unet"][name].index)
        assert torch.equal(one.values, delta.components["unet"][name].values)
    adapted.save_pretrained(tmp_path / "again")
    again = from_supertuning(tmp_path / "again", _model())
    assert {n for _, n, _ in again.entries()} == {"2.weight", "3.weight"}
    with pytest.raises(ValueError, match="per_layer=True"):
        to_supertuning(_trained(1)[1], _model(), tmp_path / "x")
    with pytest.raises(ValueError, match="no Supertuning adapter"):
        from_supertuning(tmp_path, _model())


def test_published_checkpoints(tmp_path: Path) -> None:
    model, threshold = _model(), 0.02
    values: dict[Any, Any] = {"threshold": threshold}
    wanted = _state(model)
    for place, (name, weight) in enumerate(model.named_parameters()):
        mask = weight.detach().abs() < threshold
        if mask.any():
            values[place] = nn.Parameter(weight.detach()[mask] + 0.5)
            wanted[name][mask] += 0.5
    torch.save(values, tmp_path / "old.pth")
    delta = read_published(model, tmp_path / "old.pth")
    load_sara(model, load_delta(save_delta(delta, tmp_path / "new", dtype="float32")))
    assert all(torch.allclose(v, wanted[n], atol=1e-7) for n, v in model.named_parameters())
    with pytest.raises(ValueError, match="trained from another base"):
        read_published(_model(3), tmp_path / "old.pth")
    with pytest.raises(ValueError, match="load it in float32"):
        read_published(_model().half(), tmp_path / "old.pth")
    torch.save({"a": 1}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="no 'threshold'"):
        read_published(_model(), tmp_path / "odd.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "old.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="is it damaged"):
        read_published(_model(), tmp_path / "cut.pth")
