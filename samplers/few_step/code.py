"""A row as the plain Diffusers code that does the same: to see what is done, or to do without."""

from __future__ import annotations

from typing import Any

from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.grids import grid_of

_REAL = {
    family: "true_cfg_scale" for family in ("qwen-image", "qwen-edit", "qwen21", "flux-dev", "flux-schnell")
}
_NO_GRID = ("wan-t2v", "wan-i2v", "wan-t2v-2", "wan-i2v-2", "chronoedit", "hunyuanvideo15")
_OURS = ("ListedDDIMScheduler", "FlowMatchTCDScheduler")


def plain_code(row: Row, steps: int | None = None) -> str:
    """Return Python source that loads a row's weights and runs them with Diffusers, without this plug.

    steps: one of the row's numbers, its default if None. Where Diffusers has no scheduler that does it, the
    code takes ours. Raises ValueError for rows that must not be touched.
    """
    if row.refused:
        raise ValueError(f"{row.name}: {row.refused}")
    count = row.default_steps if steps is None else steps
    if count not in row.steps:
        raise ValueError(f"{row.name} has {', '.join(map(str, row.steps))} steps, not {count}")
    body = [*_pipeline(row), *_weights(row), *_told(row), *_scheduler(row, count), *_call(row, count)]
    return "\n".join([*_imports(row, count), "", *body]) + "\n"


def _is_stock_ddim(row: Row, steps: int) -> bool:
    """Whether Diffusers' own DDIM steps along the list: trailing timesteps that divide 1000."""
    return row.scheduler == "ListedDDIMScheduler" and row.grid == "trailing" and 1000 % steps == 0


def _imports(row: Row, steps: int) -> list[str]:
    names = ["AnimateDiffPipeline", "MotionAdapter"] if row.kind == "motion" else ["DiffusionPipeline"]
    lines = []
    if _is_stock_ddim(row, steps):
        names.append("DDIMScheduler")
    elif row.scheduler in _OURS:
        lines.append(f"from diffplug.samplers.few_step import {row.scheduler}")
    elif row.scheduler:
        names.append(row.scheduler)
    lines.append(f"from diffusers import {', '.join(sorted(names))}")
    if row.kind in ("denoiser", "motion"):
        lines += ["from huggingface_hub import hf_hub_download", _reader(row)[0]]
    return ["import torch", *sorted(lines)]


def _reader(row: Row) -> tuple[str, str]:
    """Return the import and the call that read a file of full weights."""
    if row.weights[0].file.endswith(".safetensors"):
        return "from safetensors.torch import load_file", "load_file(path)"
    return "from pathlib import Path", 'torch.load(path, map_location="cpu", weights_only=True)'


def _pipeline(row: Row) -> list[str]:
    repo = row.weights[0].repo if row.kind == "pipeline" and row.weights else row.base
    pin = (
        f", revision={row.weights[0].revision!r}"
        if row.kind == "pipeline" and row.weights[:1] and row.weights[0].revision
        else ""
    )
    if row.kind == "motion":
        each = row.weights[0]
        return [
            f'path = hf_hub_download("{each.repo}", "{each.file}")',
            "adapter = MotionAdapter()",
            f"adapter.load_state_dict({_reader(row)[1]})",
            f'pipe = AnimateDiffPipeline.from_pretrained("{row.base}", motion_adapter=adapter)',
        ]
    return [f'pipe = DiffusionPipeline.from_pretrained("{repo or "your/model"}"{pin}, dtype=torch.bfloat16)']


def _weights(row: Row) -> list[str]:
    if row.kind in ("pipeline", "motion"):
        return []
    if row.kind == "denoiser":
        each = row.weights[0]
        return [
            f'path = hf_hub_download("{each.repo}", "{each.file}")',
            f"pipe.{each.component}.load_state_dict({_reader(row)[1]})",
        ]
    lines = []
    for index, each in enumerate(row.weights):
        place, _, file = each.file.rpartition("/")
        where = f'"{each.repo}"' + (f', subfolder="{place}"' if place else "")
        more = ", load_into_transformer_2=True" if each.component == "transformer_2" else ""
        name = "few-step" if index == 0 else f"few-step-{index + 1}"
        lines.append(f'pipe.load_lora_weights({where}, weight_name="{file}", adapter_name="{name}"{more})')
    if row.lora_scale != 1.0:
        lines.append(f'pipe.set_adapters(["few-step"], [{row.lora_scale:g}])  # the file stores no alpha')
    return lines


def _told(row: Row) -> list[str]:
    if row.told_scale == 1.0:
        return []
    return [
        "",
        "def told(module, args, kwargs):  # the network is told a smaller timestep",
        f"    return (args[0], args[1] * {row.told_scale:g}, *args[2:]), kwargs",
        "",
        "pipe.unet.register_forward_pre_hook(told, with_kwargs=True)",
    ]


def _scheduler(row: Row, steps: int) -> list[str]:
    options = dict(row.scheduler_options)
    name = row.scheduler
    if _is_stock_ddim(row, steps):
        name, options = "DDIMScheduler", {"timestep_spacing": "trailing", "clip_sample": False, **options}
    elif name == "FlowMatchTCDScheduler" and row.eta is not None:
        options["eta"] = row.eta
    if not name and not options:
        return []
    cls = name or "type(pipe.scheduler)"
    told = "".join(f", {key}={value!r}" for key, value in options.items())
    return [f"pipe.scheduler = {cls}.from_config(pipe.scheduler.config{told})"]


def _call(row: Row, steps: int) -> list[str]:
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    grid = grid_of(row, steps)
    lines = []
    if (
        grid.argument
        and not _is_stock_ddim(row, steps)
        and row.scheduler != "EulerAncestralDiscreteScheduler"
    ):
        if row.family in _NO_GRID:
            lines.append(
                f"# the pipeline takes no {grid.argument}: give the scheduler {grid.given()} at set_timesteps"
            )
        else:
            arguments[grid.argument] = grid.given()
    arguments |= _guidance(row)
    if row.eta is not None and row.scheduler in ("TCDScheduler", "ListedDDIMScheduler"):
        arguments["eta"] = row.eta
    arguments |= dict(row.call)
    told = "".join(f", {key}={value!r}" for key, value in arguments.items())
    if row.boundary_ratio is not None:
        lines.insert(0, f"pipe.register_to_config(boundary_ratio={row.boundary_ratio:g})")
    return [*lines, f'result = pipe("a prompt"{told})']


def _guidance(row: Row) -> dict[str, float]:
    real = _REAL.get(row.family, "guidance_scale")
    if row.guidance == "off":
        return {real: 1.0 if real == "true_cfg_scale" else 0.0}
    if row.guidance == "cfg":
        return {real: float(row.guidance_scale or 0)}
    if row.guidance == "embedded":
        name = "distilled_guidance_scale" if row.family.startswith("hunyuanimage") else "guidance_scale"
        return {name: float(row.guidance_scale or 0)}
    return {}
