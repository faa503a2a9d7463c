"""What a run leaves: weights that Diffusers loads, `recipe.json`, a model card of measured figures, a sheet.

The recipe is a row of the few-step catalogue, so `FewStep(folder)` runs the student with everything that goes
with it. The folder is ready to be pushed to a model repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffplug.files import atomic_write, output_folder, write_json
from diffplug.samplers.few_step.catalogue import Row, Weights
from diffplug.samplers.few_step.families import family_of
from diffplug.training.conditions import embeds_guidance
from diffplug.training.job import Job
from diffplug.training.student import Sampling
from diffplug.training.tuners.extract import extract_lora
from diffplug.training.tuners.full import FullTuner
from diffplug.training.tuners.lora import component_of
from diffplug.training.validation import Figures

__all__ = ["model_card", "plain_code", "recipe_row", "write_student"]


def write_student(
    job: Job, weights: Mapping[str, Tensor], folder: Path, *, updates: int, sampling: Sampling | None = None
) -> Row:
    """Write weights and `recipe.json` into `folder`, and return the recipe."""
    output_folder(folder)
    tuner, sampling = job.tuner, sampling or job.sampling()
    if isinstance(tuner, FullTuner) and job.config.tuner.extract is not None:
        saved = extract_lora(
            job.pipe, tuner.before, weights, job.config.tuner.extract, folder, job.config.tuner.save_dtype
        )
    else:
        saved = tuner.save(job.pipe, weights, folder)
    row = recipe_row(job, saved, sampling, updates)
    row.save(folder / "recipe.json")
    return row


def recipe_row(job: Job, saved: Mapping[str, Any], sampling: Sampling, updates: int) -> Row:
    """Return the catalogue row of a student whose weights are `saved` (a tuner's answer)."""
    student, teacher = job.config.student, job.config.teacher
    name, options = sampling.scheduler
    guided = sampling.guidance is not None
    flow = sampling.path.flow
    return Row(
        name=student.name,
        family=family_of(job.pipe),
        base=job.config.model,
        kind=saved["kind"],
        weights=(Weights(file=saved["file"], component=component_of(job.pipe)),),
        steps=sampling.steps,
        default_steps=sampling.usual,
        scheduler=name,
        scheduler_options=options,
        timesteps=_given(sampling),
        seen={} if flow or sampling.default else {n: _timesteps(sampling, n) for n in sampling.steps},
        sigmas={n: tuple(1 - j / n for j in range(n)) for n in sampling.steps} if flow else {},
        eta=sampling.eta if not flow else None,
        guidance="cfg" if guided else _unguided(job),
        guidance_scale=sampling.guidance if guided else _embedded_scale(job),
        negative_prompt=guided,
        lora_scale=float(saved.get("scale", 1.0)),
        alpha="file" if saved["kind"] == "lora" else "unknown",
        licence="unknown",
        source=f"trained by diffplug train {job.name}",
        meta={
            "method": job.name,
            "updates": updates,
            "segments": student.steps,
            "shift": sampling.path.shift,
            "teacher": {"sampler": teacher.sampler, "steps": teacher.steps, "guidance": teacher.guidance},
            "seed": job.config.run.seed,
        },
    )


def _given(sampling: Sampling) -> dict[int, tuple[float, ...]]:
    found = {n: sampling.given(n) for n in sampling.steps}
    return {n: tuple(float(t) for t in given) for n, given in found.items() if given is not None}


def _timesteps(sampling: Sampling, n: int) -> tuple[float, ...]:
    if (given := sampling.given(n)) is not None:
        return tuple(float(t) for t in given)
    steps = sampling.path.train_steps
    return tuple(float(round(steps - j * steps / n) - 1) for j in range(n))


def _unguided(job: Job) -> str:
    return "embedded" if embeds_guidance(job.pipe) else "off"


def _embedded_scale(job: Job) -> float | None:
    return float(job.call["guidance_scale"]) if _unguided(job) == "embedded" else None


def plain_code(row: Row, model: str, folder: str) -> str:
    """Return the lines that run the student in plain Diffusers."""
    where = "diffplug.loading.shapes_folder()" if model == "shapes" else repr(model)
    load = f"DiffusionPipeline.from_pretrained({where})"
    head = ["import diffplug.loading"] if model == "shapes" else []
    options = "".join(f", {name}={value!r}" for name, value in row.scheduler_options.items())
    off = "" if row.guidance == "embedded" else f", guidance_scale={row.guidance_scale or 1.0:g}"
    eta = f", eta={row.eta:g}" if row.eta else ""
    listed = row.timesteps.get(row.default_steps)
    grid = f", timesteps={[int(t) for t in listed]}" if listed else ""
    file, component = row.weights[0].file, row.weights[0].component
    imports, weights = _loading(row.kind, component, folder, file)
    return "\n".join(
        [
            *head,
            f"from diffusers import DiffusionPipeline, {row.scheduler}",
            *imports,
            "",
            f"pipe = {load}",
            weights,
            f"pipe.scheduler = {row.scheduler}.from_config(pipe.scheduler.config{options})",
            f'image = pipe("...", num_inference_steps={row.default_steps}{grid}{off}{eta}).images[0]',
        ]
    )


def _loading(kind: str, component: str, folder: str, file: str) -> tuple[list[str], str]:
    """Return the imports, and the line that puts a tuner's file on a pipeline."""
    path = f"{folder}/{file}"
    if kind == "lora":
        return [], f"pipe.load_lora_weights({folder!r}, weight_name={file!r})"
    if kind == "sara":
        return ["from diffplug.sara import load_sara"], f"load_sara(pipe, {path!r})"
    if kind == "peft":
        lines = ["import diffplug", "from diffplug.samplers import FewStep"]
        return lines, f"diffplug.apply(pipe, FewStep({folder!r}, schedule=False))"
    load = f"pipe.{component}.load_state_dict(load_file({path!r}))"
    return ["from safetensors.torch import load_file"], load


def model_card(job: Job, row: Row, figures: Figures | None, seconds: float, folder: Path) -> str:
    """Return the text of README.md; figures are those measured at the end of the run."""
    judged = job.config.validation.reward
    opening = getattr(job.method, "opening", _opening)
    kind = "few-step, distillation" if opening is _opening else "fine-tuning"
    lines = [
        "---",
        "library_name: diffusers",
        f"tags: [diffplug, {kind}]",
        f"base_model: {job.config.model}",
        "---",
        "",
        f"# {row.name}",
        "",
        opening(job, row, seconds),
        "",
        "```python",
        "import diffplug",
        "from diffplug.samplers import FewStep",
        "",
        f"pipe = diffplug.load({job.config.model!r})",
        f"with diffplug.plug(pipe, FewStep({str(folder)!r})):",
        '    image = pipe("...").images[0]',
        "```",
        "",
        "In plain Diffusers:",
        "",
        "```python",
        plain_code(row, job.config.model, str(folder)),
        "```",
        "",
    ]
    if figures is not None:
        lines += [
            f"Measured on {figures.n} pictures by `{judged}`: mean {figures.mean:.3f} ± {figures.error:.3f}, "
            f"at least 1 in {figures.best:.1%} ± {figures.best_error:.1%}.",
            "",
        ]
    lines += ["The whole config:", "", "```json", json.dumps(job.mapping(), indent=2), "```", ""]
    return "\n".join(lines)


def _opening(job: Job, row: Row, seconds: float) -> str:
    """Return the first sentence of a student's card."""
    return (
        f"A student of `{job.config.model}` for {' or '.join(map(str, row.steps))} network evaluations a "
        f"picture, trained by `diffplug train {job.name}` ({row.meta['updates']} updates, {seconds:.0f} s)."
    )


def write_card(job: Job, row: Row, figures: Figures | None, seconds: float, folder: Path) -> None:
    """Write README.md and, where there are figures, `figures.json`."""
    atomic_write(folder / "README.md", model_card(job, row, figures, seconds, folder))
    if figures is not None:
        write_json(folder / "figures.json", {"reward": job.config.validation.reward, **vars(figures)})
