"""Stage 2 of SpeedUpNet on the distilled four-step student of Shapes: negatives that act at four evaluations.

    python -m benchmarks.negative_four -o runs/negative-four
    python -m benchmarks.negative_four -o runs/negative-four --measure

The teacher is the base with guidance in 24 steps; the student is the base with the four-step LoRA in it, and
beside it the shipped adapter, trained on until its single steps land where six guided ones do.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import command, opened
from benchmarks.negative_cases import cases
from benchmarks.negative_prompts import in_four, text
from diffplug.files import output_folder, write_json
from diffplug.loading import shapes_folder
from diffplug.samplers.negative.speedupnet import shipped_adapter
from diffplug.samplers.negative.state import NegativeState
from diffplug.samplers.negative.sun_adapter import put_on
from diffplug.samplers.negative.sun_file import load_adapter, save_adapter
from diffplug.shapes import sample_prompts
from diffplug.training.conditions import encode
from diffplug.training.config import OptimizerSettings, RunSettings
from diffplug.training.noise_path import NoisePath
from diffplug.training.objectives.guidance_distillation import DistillationSettings
from diffplug.training.objectives.multi_step_consistency import MultiStepConsistency
from diffplug.training.precision import autocast
from diffplug.training.preference.start import put_in
from diffplug.training.speedupnet.guidance_states import GuidanceStates, StateSettings, TextNetwork, collect
from diffplug.training.speedupnet.negatives import NegativeSettings, draw_pairs
from diffplug.training.trainer import Trainer

STEPS, STUDENT = 24, 4
FILE = "speedupnet-4.safetensors"


def teacher_states(pipe: Any, network: TextNetwork, rollouts: int, file: Path) -> GuidanceStates:
    """Return guided runs of the base, from their file where they were made before."""
    if file.is_file():
        return GuidanceStates.load(file, network.path)
    prompts = sample_prompts(rollouts, seed=2, kind="mixed", split="train")
    pairs = draw_pairs(prompts, NegativeSettings(empty=0.15, vague=0.4), 0)
    settings = StateSettings(rollouts=rollouts, steps=STEPS, fresh=0, guidance=(3.0, 7.0))
    states = collect(network, pairs, lambda texts: encode(pipe, texts)[1], settings)
    states.save(file)
    return states


def train(pipe: Any, folder: Path, rollouts: int, updates: int, batch: int, lr: float) -> Path:
    """Train the second stage and return its file; an interrupted run goes on."""
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    form, _ = encode(pipe, ["a red circle"])
    path, state = NoisePath.of(pipe.scheduler), NegativeState()
    adapter = load_adapter(str(shipped_adapter(pipe)), pipe.unet).requires_grad_(True)
    adapter.meta = replace(adapter.meta, steps=(STUDENT,), guidance_range=(3.0, 7.0), figures={})
    with autocast(pipe.unet, torch.bfloat16):
        states = teacher_states(
            pipe, TextNetwork(pipe.unet, path, form), rollouts, folder / "states.safetensors"
        )
    student = copy.deepcopy(pipe.unet)
    put_in(student, shapes_folder().parent / "few_step" / "four.safetensors")
    undo = put_on(adapter, student, state)
    wanted = DistillationSettings(
        consistency=STUDENT, blend=0.0, states=StateSettings(rollouts=rollouts, steps=STEPS, fresh=0)
    )
    with autocast(student, torch.bfloat16):
        result = Trainer(
            MultiStepConsistency(TextNetwork(student, path, form), adapter, state, states, wanted),
            RunSettings(updates=updates, batch=batch, save_every=20),
            OptimizerSettings(lr=lr, warmup=5, floor=0.05, ema=0.95),
            folder=folder,
            cpu=True,
        ).run()
    undo()
    adapter.load_state_dict(result.weights["adapter"])
    return save_adapter(adapter.requires_grad_(False), folder / FILE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or measure what was trained against the shipped adapter and NAG."""
    told = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    pipe, folder = opened("shapes", "cpu"), output_folder(told.out)
    if not told.measure:
        print(train(pipe, folder, told.rollouts, told.updates, told.batch, told.lr))
        return
    wanted = cases(told.cases, told.seed)
    found = in_four(pipe, None, wanted, told.seed * 10**6)
    (second,) = in_four(pipe, folder / FILE, wanted, told.seed * 10**6, alone=True)
    found.append({**second, "method": "student, second stage at 5"})
    print(text(found))
    write_json(Path(__file__).parent / "results" / "negative_four.json", {"cases": told.cases, "rows": found})


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__)
    add = parser.add_argument
    add("-o", "--out", type=Path, default=Path("runs/negative-four"))
    add("--measure", action="store_true")
    add("--rollouts", type=int, default=256)
    add("--updates", type=int, default=100)
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=5e-4)
    add("--cases", type=int, default=240)
    add("--seed", type=int, default=1, help="of the cases")
    return parser


if __name__ == "__main__":
    main()
