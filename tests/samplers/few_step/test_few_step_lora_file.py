"""LoRA files by their structure: every format means the same, and what does not fit is refused by its key."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from few_step_kit import RANK, delta, factors, kohya_file, peft_file, recipe
from safetensors.torch import save_file

from diffplug.plug import plug
from diffplug.samplers.few_step import FewStep
from diffplug.samplers.few_step.lora_file import LoRA, read_lora
from diffplug.samplers.few_step.weights_file import read_weights
from diffplug.testing import tiny

UNET = tiny("sd15").unet
LAYERS = factors(UNET)
NAMES = list(LAYERS)


def read(state: dict[str, torch.Tensor], **options: Any) -> LoRA:
    return read_lora(state, UNET, pipeline=type(tiny("sd15")), **options)


def assert_means(lora: LoRA, scale: float) -> None:
    """Every layer's change is the factors' product times the scale."""
    assert set(lora.layers) == set(LAYERS) and lora.ranks == (RANK,)
    for name, pair in LAYERS.items():
        change = lora.layers[name].delta()
        assert change is not None
        torch.testing.assert_close(change, scale * delta(*pair))


@pytest.mark.contract
@pytest.mark.parametrize(
    ("state", "scale"),
    [
        (peft_file(LAYERS, "unet"), 0.125),
        (peft_file(LAYERS, "base_model.model"), 0.125),
        (
            {k.removeprefix("unet.").replace("A.w", "A.default.w").replace("B.w", "B.default.w"): v
             for k, v in peft_file(LAYERS, "unet").items()},
            0.125,
        ),
        (kohya_file(LAYERS, None), 0.125),
        (kohya_file(LAYERS, 1.0), 1.0 / RANK),
        (kohya_file(LAYERS, 8.0), 8.0 / RANK),
    ],
    ids=["diffusers", "peft", "peft default", "kohya without alpha", "kohya alpha 1", "kohya alpha 8"],
)  # fmt: skip
def test_formats_mean_the_same_and_only_a_missing_alpha_takes_the_trained_scale(
    state: dict[str, torch.Tensor], scale: float
) -> None:
    lora = read(state, trained_scale=0.125)
    assert lora.with_alpha == (scale != 0.125)
    assert_means(lora, scale)


@pytest.mark.contract
def test_alphas_in_the_header_of_a_diffusers_file_are_read() -> None:
    config = {"unet.lora_alpha": 4, "unet.r": RANK, "unet.alpha_pattern": {"conv_in": 1}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    lora = read(peft_file(LAYERS, "unet"), trained_scale=0.125, metadata=metadata)
    assert lora.with_alpha
    for name, pair in LAYERS.items():
        change = lora.layers[name].delta()
        assert change is not None
        torch.testing.assert_close(change, (1 if name == "conv_in" else 4) / RANK * delta(*pair))


@pytest.mark.contract
def test_what_diffusers_saves_with_its_metadata_comes_back(tmp_path: Path) -> None:
    """The trainer's way: save_lora_weights with an alpha that is not the rank."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = tiny("sd15")
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "student")
    wanted = {
        name: part.get_delta_weight("student")
        for name, part in pipe.unet.named_modules()
        if hasattr(part, "get_delta_weight")
    }
    type(pipe).save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name="student"),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    state, metadata = read_weights(tmp_path / "pytorch_lora_weights.safetensors")
    lora = read_lora(state, tiny("sd15").unet, metadata=metadata, trained_scale=0.125)
    assert lora.with_alpha and set(lora.layers) == set(wanted)
    for name, change in wanted.items():
        torch.testing.assert_close(lora.layers[name].delta(), change)


@pytest.mark.contract
@pytest.mark.pipe
def test_lightx2v_keys_with_biases_and_norms(tmp_path: Path) -> None:
    """Original Wan names, lora_down/up, diff_b for biases; Diffusers names what Wan's converter knows."""
    pipe = tiny("wan")
    parts = dict(pipe.transformer.named_modules())
    noise = torch.Generator().manual_seed(0)
    state, wanted = {}, {}
    for old, new in (
        ("self_attn.q", "attn1.to_q"),
        ("cross_attn.o", "attn2.to_out.0"),
        ("ffn.0", "ffn.net.0.proj"),
    ):
        for block in range(len(pipe.transformer.blocks)):
            part = parts[f"blocks.{block}.{new}"]
            down = torch.randn(RANK, part.in_features, generator=noise)
            up, bias = torch.randn(part.out_features, RANK, generator=noise), torch.randn(part.out_features)
            stem = f"diffusion_model.blocks.{block}.{old}"
            state |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.diff_b": bias}
            wanted[f"blocks.{block}.{new}"] = (up @ down, bias)
    lora = read_lora(state, pipe.transformer, pipeline=type(pipe))
    for name, (change, bias) in wanted.items():
        torch.testing.assert_close(lora.layers[name].delta(), change)
        torch.testing.assert_close(lora.layers[name].bias, bias)


@pytest.mark.contract
@pytest.mark.pipe
@pytest.mark.parametrize("merge", ["runtime", "fuse"])
def test_weight_and_bias_differences_act_and_go(tmp_path: Path, merge: str) -> None:
    """A file with factors and a bias for one layer, a plain difference for another."""
    pipe = tiny("sd15")
    name, other = "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "conv_norm_out"
    part, norm = pipe.unet.get_submodule(name), pipe.unet.get_submodule(other)
    down, up, bias = (
        torch.randn(2, part.in_features),
        torch.randn(part.out_features, 2),
        torch.randn(part.out_features),
    )
    state = {
        f"unet.{name}.lora_A.weight": down,
        f"unet.{name}.lora_B.weight": up,
        f"unet.{name}.diff_b": bias,
        f"unet.{other}.diff": torch.ones_like(norm.weight),
    }
    recipe(tmp_path, LAYERS)
    save_file(state, str(tmp_path / "adapter.safetensors"))
    x, before, weight = torch.randn(3, part.in_features), part.weight.clone(), norm.weight.clone()
    wanted = x @ (before + 0.5 * up @ down).T + part.bias + 0.5 * bias
    undo = plug(pipe, FewStep(tmp_path, merge=merge, strength=0.5))
    torch.testing.assert_close(pipe.unet.get_submodule(name)(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.weight, weight + 0.5)
    undo()
    assert torch.equal(part.weight, before) and torch.equal(norm.weight, weight)
    assert pipe.unet.get_submodule(name) is part


@pytest.mark.contract
@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin", ".pth"])
def test_pickles_of_tensors_are_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"file{ending}"
    torch.save({"epoch": 3, "state_dict": kohya_file(LAYERS, 1.0)}, path)
    assert_means(read(read_weights(path)[0]), 1.0 / RANK)


class Evil:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.contract
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
    with pytest.raises(ValueError, match="cannot be read with weights_only=True"):
        read_weights(path)
    torch.save({"state_dict": Evil(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read with weights_only=True"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.contract
def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file(peft_file(LAYERS, "unet"), str(path))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter\.safetensors' is damaged"):
        read_weights(path)
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="is no weight file"):
        read_weights(tmp_path / "a.txt")
    torch.save([1, 2], tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_weights(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "b.pt")


def _without(state: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != key}


FIRST = f"unet.{NAMES[0]}"


@pytest.mark.contract
@pytest.mark.parametrize(
    ("state", "said"),
    [
        (_without(peft_file(LAYERS, "unet"), f"{FIRST}.lora_B.weight"), "has no second factor"),
        (_without(peft_file(LAYERS, "unet"), f"{FIRST}.lora_A.weight"), "has no first factor"),
        ({**peft_file(LAYERS, "unet"), "unet.extra": torch.ones(2)}, "key 'unet.extra' is none"),
        (
            {**peft_file(LAYERS, "unet"), f"{FIRST}.lora_B.weight": torch.ones(5, 3)},
            "do not fit together",
        ),
        (
            {**peft_file(LAYERS, "unet"), f"{FIRST}.lora_B.weight": torch.ones(999, RANK, 1, 1)},
            "for another model: 'conv_in' goes from 4 to 8",
        ),
        (
            {"unet.nowhere.lora_A.weight": torch.ones(2, 4), "unet.nowhere.lora_B.weight": torch.ones(4, 2)},
            "nowhere",
        ),
        ({**kohya_file(LAYERS, 1.0), "lora_unet_nowhere.alpha": torch.tensor(1.0)}, "alpha without factors"),
        ({f"{FIRST}.lora_A.weight": torch.ones(2, 4), f"{FIRST}.dora_scale": torch.ones(2)}, "DoRA"),
        ({"unet.conv_in.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({"unet.conv_in.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_first_key(
    state: dict[str, torch.Tensor], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        read(state)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.contract
def test_a_file_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="is for another model"):
        read(peft_file(factors(tiny("flux").transformer), "transformer"))
    with pytest.raises(ValueError, match="is for another model"):
        read(kohya_file(factors(tiny("sdxl").unet), 1.0))
