"""`diffplug train speedupnet`: states of the teacher, the adapter's training, its file and its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffplug.files import atomic_write, output_folder, write_json
from diffplug.plug import plug
from diffplug.samplers.few_step.families import family_of
from diffplug.samplers.few_step.plug import FewStep
from diffplug.samplers.fingerprint import architecture, fingerprint
from diffplug.samplers.negative.call import guidance_argument
from diffplug.samplers.negative.speedupnet import shipped_adapter
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import AdapterMeta, SunAdapter, put_on
from diffplug.samplers.negative.sun_file import load_adapter, save_adapter
from diffplug.training.checkpoint import Checkpoints, take_up
from diffplug.training.conditions import Conditions, encode, one_denoiser
from diffplug.training.objectives.guidance_distillation import DistillationSettings, GuidanceDistillation
from diffplug.training.objectives.multi_step_consistency import MultiStepConsistency
from diffplug.training.precision import autocast
from diffplug.training.speedupnet.adapter_score import AdapterScore, score_adapter
from diffplug.training.speedupnet.guidance_states import GuidanceStates, TextNetwork, collect, states_key
from diffplug.training.speedupnet.negatives import Pairs, draw_pairs
from diffplug.training.trainer import Trainer

__all__ = ["FILE", "SpeedUpNetDistillation", "train_adapter"]

FILE = "speedupnet.safetensors"
_IDLE = ("teacher", "student", "tuner", "validation")
_SCORED = 32
"""Pairs of prompts by which a finished adapter is scored."""


def train_adapter(
    job: Any,
    folder: Path,
    *,
    resume: bool | None = None,
    minutes: float | None = None,
    on_progress: Callable[[str, int, int, Mapping[str, float]], None] = lambda *told: None,
) -> Any:
    """Train the adapter of a job in `folder`, and return what it has come to, as `training.train.train` does.

    Its file is `student/speedupnet.safetensors`. Raises ValueError before any work for a model without
    guidance or cross-attention, and for tables of the config that do nothing here.
    """
    from diffplug.training.train import Trained

    began = time.monotonic()
    output_folder(folder)
    take_up(Checkpoints(folder / "checkpoints"), resume, job.mapping())
    _check(job)
    denoiser, settings = one_denoiser(job.pipe), job.objective
    dtype = torch.bfloat16 if job.config.run.precision == "bf16" else None
    form, _ = encode(job.pipe, job.prompts[:1])
    network, state = TextNetwork(denoiser, job.path, form), NegativeState()
    start = shipped_adapter(job.pipe) if settings.start == "shipped" else settings.start
    with ExitStack() as changes:
        changes.enter_context(autocast(denoiser, dtype))
        states = _states(job, network, on_progress)
        if settings.student is not None:
            changes.enter_context(plug(job.pipe, _student(settings)))
        adapter = _adapter(job, start)
        changes.callback(put_on(adapter, denoiser, state))
        objective = MultiStepConsistency if settings.consistency else GuidanceDistillation
        trainer = Trainer(
            objective(network, adapter, state, states, settings),
            job.config.run,
            job.config.optimizer,
            folder=folder,
            config=job.mapping(),
            resume=resume,
            minutes=_left(began, minutes),
            cpu=job.device == "cpu",
            on_update=lambda update, told: on_progress("updates", update + 1, job.config.run.updates, told),
        )
        result = trainer.run()
    if result.stopped:
        return Trained(None, result.updates, None, time.monotonic() - began)
    adapter.load_state_dict(result.weights["adapter"])
    student = folder / "student"
    if trainer.accelerator.is_main_process:
        _write(job, adapter.requires_grad_(False), student, time.monotonic() - began)
    return Trained(student, result.updates, None, time.monotonic() - began)


def _left(began: float, minutes: float | None) -> float | None:
    return None if minutes is None else max(0.0, minutes - (time.monotonic() - began) / 60)


def _check(job: Any) -> None:
    """Raise ValueError for what would only be noticed after the teacher's work, or do nothing."""
    if guidance_argument(job.pipe) is None:
        raise ValueError(
            f"{type(job.pipe).__name__} has no guidance of its own to distil: train on the model that it "
            "was made from"
        )
    defaults = type(job.config)()
    for table in _IDLE:
        if getattr(job.config, table) != getattr(defaults, table):
            raise ValueError(
                f"the table [{table}] does nothing for speedupnet: leave it out (see [objective])"
            )
    if job.objective.student is not None:
        _student(job.objective).row_for(job.pipe)  # refuses what has no row for this model and these steps
    if job.objective.start == "shipped" and shipped_adapter(job.pipe) is None:
        raise ValueError("objective.start='shipped': the package has no adapter of this model; give a file")
    if job.config.run.gradient_checkpointing:
        raise ValueError(
            "run.gradient_checkpointing is not for speedupnet: an adapter's prompts are gone when it asks"
        )


def _student(settings: DistillationSettings) -> FewStep:
    """Return the plug that puts the student's weights into the model, and nothing else."""
    return FewStep(str(settings.student), steps=settings.consistency, schedule=False)


def _adapter(job: Any, start: str | Path | None) -> SunAdapter:
    """Return the adapter to train, on the device, its weights float32. start: file of one to go on from.

    A few-step student has guidance in it already, so without a negative prompt its adapter stays off.
    """
    denoiser, settings = one_denoiser(job.pipe), job.objective
    low, high = settings.guidance
    meta = AdapterMeta(
        layout=settings.layout,
        family=family_of(job.pipe),
        prediction_type=job.path.prediction,
        guidance=settings.default,
        guidance_range=(low, high),
        steps=(settings.consistency,) if settings.consistency else (),
        empty="adapter" if settings.student is None else "off",
        model=fingerprint(job.pipe),
        architecture=architecture(job.pipe),
    )
    torch.manual_seed(job.config.run.seed)
    adapter = SunAdapter.beside(denoiser, meta, gate=settings.gate)
    if start is not None:
        adapter.load_state_dict(load_adapter(str(start), denoiser).state_dict())
    return adapter.to(job.device, torch.float32).requires_grad_(True)


def _states(job: Any, network: TextNetwork, on_progress: Callable[..., None]) -> GuidanceStates:
    """Return the teacher's states: those of the cache, or new ones, which are kept there."""
    told = job.objective
    pairs = draw_pairs(job.prompts[: max(1, told.states.rollouts)], told.negatives, job.config.run.seed)
    pairs = _enough(pairs, max(told.states.rollouts, 1))
    key = states_key(pairs, told.states, {"model": fingerprint(job.pipe), "seed": job.config.run.seed})
    file = job.cache / "guidance" / f"{key}.safetensors"
    if file.is_file():
        return GuidanceStates.load(file, job.path)
    total, done = told.states.rollouts * told.states.steps + told.states.fresh, 0

    def more(n: int) -> None:
        nonlocal done
        done += n
        on_progress("states", done, total, {})

    states = collect(
        network,
        pairs,
        lambda texts: _encoded(job.pipe, texts),
        told.states,
        seed=job.config.run.seed,
        device=job.device,
        on_rows=more,
    )
    states.save(file)
    return states


def _enough(pairs: Pairs, count: int) -> Pairs:
    """Return pairs repeated to at least `count`."""
    times = -(-count // len(pairs.positive))
    return Pairs(pairs.positive * times, pairs.negative * times)


def _encoded(pipe: Any, texts: Sequence[str]) -> Conditions:
    return encode(pipe, texts)[1]


def _write(job: Any, adapter: SunAdapter, folder: Path, seconds: float) -> None:
    """Score the adapter, write its file with the figures in it, and a model card."""
    score = _scored(job, adapter)
    adapter.meta = replace(adapter.meta, figures={} if score is None else score.to_json())
    output_folder(folder)
    save_adapter(adapter, folder / FILE)
    write_json(folder / "config.json", job.mapping())
    atomic_write(folder / "README.md", _card(job, adapter, score, seconds))


def _scored(job: Any, adapter: SunAdapter) -> AdapterScore | None:
    """Return how near the adapter is to guidance; None where guidance of its own network says nothing."""
    if job.objective.student is not None:
        return None
    words = replace(job.objective.negatives, empty=0.0)
    pairs = draw_pairs(job.prompts[-_SCORED:], words, job.config.run.seed + 1)
    kept = [(a, b) for a, b in zip(pairs.positive, pairs.negative, strict=True) if b]
    if not kept:
        return None
    return score_adapter(job.pipe, adapter, [a for a, _ in kept], [b for _, b in kept], states=128)


def _card(job: Any, adapter: SunAdapter, score: AdapterScore | None, seconds: float) -> str:
    count = sum(value.numel() for value in adapter.parameters())
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "tags: [diffplug, speedupnet, negative-prompt]",
            f"base_model: {job.config.model}",
            "---",
            "",
            f"# SpeedUpNet adapter for `{job.config.model}`",
            "",
            f"Guidance with negative prompts in one evaluation a step: {count:,} parameters, trained by "
            "`diffplug train "
            f"speedupnet` ({job.config.run.updates} updates, {seconds:.0f} s).",
            "",
            "```python",
            *_python(job.objective),
            "```",
            "",
            *([] if score is None else [f"Measured: {score}.", ""]),
            "The whole config:",
            "",
            "```json",
            json.dumps(job.mapping(), indent=2),
            "```",
            "",
        ]
    )


def _python(settings: DistillationSettings) -> list[str]:
    """Return the lines that use an adapter."""
    names, plugs, scale = "SpeedUpNet", f'SpeedUpNet("{FILE}")', f", guidance_scale={settings.default:g}"
    if settings.student is not None:  # which takes no guidance of a call; the adapter has its own
        names, scale = "FewStep, SpeedUpNet", ""
        plugs = f'FewStep("{settings.student}", steps={settings.consistency}), {plugs}'
    return [
        f"from diffplug.samplers import {names}",
        "",
        f"with diffplug.plug(pipe, {plugs}):",
        f'    image = pipe("...", negative_prompt="..."{scale}).images[0]',
    ]


class SpeedUpNetDistillation(GuidanceDistillation):
    """The method `speedupnet` of `diffplug train`: its output is an adapter, with figures of its own."""

    run = staticmethod(train_adapter)
