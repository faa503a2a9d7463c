"""The identity of a model: the same however its networks are wrapped, and another after training."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

from diffplug import load
from diffplug.plug import plug
from diffplug.samplers import Solver
from diffplug.samplers.fingerprint import architecture, conditioning_fingerprint, fingerprint
from diffplug.samplers.library import shipped_folder
from diffplug.samplers.schedule import presets
from diffplug.testing import tiny

PIPE: Any = tiny("sd15")
SAME = fingerprint(PIPE), architecture(PIPE)


def with_unet(change: Callable[[Any], Any]) -> Any:
    pipe, unet = copy.copy(PIPE), copy.deepcopy(PIPE.unet)
    changed = change(unet)
    pipe.unet = unet if changed is None else changed
    return pipe


def regional(unet: Any) -> None:
    unet.down_blocks[0] = torch.compile(unet.down_blocks[0], backend="eager")


def offloaded(unet: Any) -> None:
    accelerate.cpu_offload(unet, torch.device("cpu"))


def grouped(unet: Any) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def unfused(unet: Any) -> None:
    unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()


@pytest.mark.law
@pytest.mark.parametrize(
    "change",
    [
        lambda unet: torch.compile(unet, backend="eager"),
        lambda unet: unet.compile(backend="eager"),
        regional,
        lambda unet: unet.fuse_qkv_projections(),
        unfused,
        offloaded,
        grouped,
        torch.nn.DataParallel,
        lambda unet: unet.to(memory_format=torch.channels_last),
    ],
    ids=[
        *("compiled", "in-place", "regional", "fused", "unfused"),
        *("offloaded", "grouped", "parallel", "channels-last"),
    ],
)
def test_wrappers_leave_a_model_what_it_is(change: Any) -> None:
    pipe = with_unet(change)
    assert (fingerprint(pipe), architecture(pipe)) == SAME


ADAPTERS = [
    LoraConfig(target_modules=["to_q"], init_lora_weights=False),
    LoHaConfig(target_modules=["to_q"], init_weights=False),
    LoKrConfig(target_modules=["to_q"], init_weights=False),
    LoraConfig(target_modules=["to_q"], modules_to_save=["conv_in"]),
]


def switched_off(unet: Any) -> None:
    for layer in unet.modules():
        if layer is not unet and hasattr(layer, "enable_adapters"):
            layer.enable_adapters(False)


@pytest.mark.law
@pytest.mark.parametrize("config", ADAPTERS, ids=["lora", "loha", "lokr", "saved"])
def test_adapters_leave_the_architecture_and_change_the_weights_while_they_act(config: Any) -> None:
    pipe = with_unet(lambda unet: inject_adapter_in_model(config, unet, "one"))
    assert architecture(pipe) == SAME[1] and fingerprint(pipe) != SAME[0]
    switched_off(pipe.unet)
    assert (fingerprint(pipe), architecture(pipe)) == SAME


@pytest.mark.law
def test_the_strength_of_an_adapter_is_part_of_what_acts() -> None:
    pipe = with_unet(lambda unet: inject_adapter_in_model(ADAPTERS[0], unet, "one"))
    before = fingerprint(pipe)
    for layer in pipe.unet.modules():
        if hasattr(layer, "adapter_layer_names"):
            layer.scaling["one"] = 0.5
    assert fingerprint(pipe) != before


@pytest.mark.law
def test_picture_prompts_are_an_adapter_too() -> None:
    proj = {"proj.weight": (128, 32), "proj.bias": (128,), "norm.weight": (32,), "norm.bias": (32,)}
    state: dict[str, Any] = {"image_proj": {k: torch.ones(*shape) for k, shape in proj.items()}}
    unet = copy.deepcopy(PIPE.unet)
    sites = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    state["ip_adapter"] = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.ones(unet.get_submodule(site).to_k.out_features, 32)
        for i, site in enumerate(sites)
        for part in "kv"
    }
    unet._load_ip_adapter_weights([state])
    pipe = with_unet(lambda _: unet)
    assert architecture(pipe) == SAME[1] and fingerprint(pipe) != SAME[0]


@pytest.mark.law
def test_quantised_and_other_types_keep_the_architecture() -> None:
    def packed(unet: Any) -> Any:
        return torch.ao.quantization.quantize_dynamic(unet, {torch.nn.Linear}, dtype=torch.qint8)

    def small(unet: Any) -> None:
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for change in (packed, small, lambda unet: unet.half()):
            pipe = with_unet(change)
            assert architecture(pipe) == SAME[1]
            assert fingerprint(pipe) == fingerprint(pipe) != SAME[0]


@pytest.mark.law
def test_another_model_is_another_model() -> None:
    assert architecture(tiny("sdxl")) != SAME[1] and fingerprint(tiny("sd15", seed=1)) != SAME[0]
    assert architecture(tiny("sd15", seed=1)) == SAME[1]
    for name in tiny.names():
        pipe = tiny(name)
        assert len({fingerprint(pipe), architecture(pipe), conditioning_fingerprint(pipe)}) == 3


@pytest.mark.pipe
def test_what_ships_still_belongs_to_the_embedded_model() -> None:
    pipe = load("shapes")
    for path in shipped_folder("shapes").glob("*-*.json"):
        meta = json.loads(path.read_text("utf-8"))["meta"]
        assert (meta["model"], meta["architecture"]) == (fingerprint(pipe), architecture(pipe))


@pytest.mark.pipe
def test_a_searched_file_runs_on_a_compiled_network_without_a_word() -> None:
    meta = {"model": SAME[0], "architecture": SAME[1], "steps": 2}
    made = replace(presets.dpmpp(2, "karras"), meta=meta)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for change in (lambda unet: torch.compile(unet, backend="eager"), lambda u: u.fuse_qkv_projections()):
            pipe = with_unet(change)
            with plug(pipe, Solver(made)):
                pipe(**tiny.inputs("sd15"))
    with pytest.raises(ValueError, match="the schedule for 2 steps belongs to another model"):
        plug(tiny("sdxl"), Solver(made))
    odd = replace(made, meta={"model": 5, "architecture": SAME[1], "steps": "x" * 500})
    warned = pytest.warns(UserWarning, match=r"was searched for other weights \(model 5, this")
    with warned as caught, plug(PIPE, Solver(odd)):
        pass
    assert len(str(caught[0].message)) < 300
