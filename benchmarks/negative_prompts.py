"""What a negative prompt is worth by each method, on Shapes: obedience, right pictures, distance to
guidance, cost.

    python -m benchmarks.negative_prompts            # tables, benchmarks/results/negative_prompts.json
    python -m benchmarks.negative_prompts --sheet docs/negative_prompts.png
    python -m benchmarks.negative_prompts toy        # on sixteen points; benchmarks/results/negative_toy.json

Cases are those of `benchmarks.negative_cases`; picture i of every method starts from seed i. Distance is the
mean squared difference of final latents to guidance at the same scale, relative to that of no guidance.
"blind" is the adapter that is not shown the negative prompt: it must fail. DDIM on trailing timesteps, 25
steps.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import command, opened
from benchmarks.negative_cases import Case, cases, judge, kinds_of_negatives
from benchmarks.sheets import save
from diffplug import plug
from diffplug.files import output_folder, write_json
from diffplug.latents import decode
from diffplug.samplers.few_step.plug import FewStep
from diffplug.samplers.negative.classifier_free import ClassifierFree
from diffplug.samplers.negative.nag import NAG
from diffplug.samplers.negative.speedupnet import SpeedUpNet
from diffplug.seeds import Seeds
from diffplug.shapes import grade, sample_prompts

RESULTS = Path(__file__).parent / "results"
STEPS, ROWS = 25, 50


@dataclass(frozen=True)
class Method:
    """A way of drawing: what is plugged in, what is told, whether it is shown the negative prompt."""

    label: str
    scale: float
    plugs: tuple[Any, ...] = ()
    negative: bool = True
    sun: bool = False


def methods(adapter: Any, scale: float) -> list[Method]:
    """Return the methods at a guidance scale; NAG has its own."""
    sun = (SpeedUpNet(adapter),)
    return [
        Method("guidance, empty negative", scale, negative=False),
        Method("guidance", scale),
        Method("guidance in the first half", scale, (ClassifierFree(interval=(0.0, 0.5)),)),
        Method("adapter, blind", scale, sun, negative=False, sun=True),
        Method("adapter", scale, sun, sun=True),
    ]


@dataclass(frozen=True)
class Drawn:
    """Final latents [n, ...], and network rows for each picture."""

    latents: Tensor
    rows: float


@torch.no_grad()
def drawn(
    pipe: Any,
    method: Method,
    prompts: Sequence[str],
    negatives: Sequence[str] | None,
    seed: int | Sequence[int] = 0,
) -> Drawn:
    """Return what a method draws, picture i from seed + i, or from seeds of their own."""
    from diffusers import DDIMScheduler

    trailing = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    parts, told = [], {} if method.scale == 0 else {"guidance_scale": method.scale}
    with plug(pipe, trailing, *method.plugs):
        rows = _count_rows(pipe)
        for begin in range(0, len(prompts), ROWS):
            some = slice(begin, begin + ROWS)
            if negatives is not None and method.negative:
                told["negative_prompt"] = list(negatives[some])
            with plug(pipe, Seeds(seeds[some])):
                parts.append(
                    pipe(list(prompts[some]), num_inference_steps=STEPS, output_type="latent", **told)[0]
                )
    return Drawn(torch.cat(parts), rows() / len(prompts))


def _count_rows(pipe: Any) -> Any:
    """Return what tells the rows that the first layer of the U-Net has seen since, and stops counting."""
    seen = [0]
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda m, a: seen.__setitem__(0, seen[0] + len(a[0])))

    def told() -> int:
        hook.remove()
        return seen[0]

    return told


def obedience(
    pipe: Any, adapter: Any, told: Sequence[Case], scales: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """Return a row of figures for each method and scale."""
    prompts, negatives = [case.prompt for case in told], [case.negative for case in told]
    plain = drawn(pipe, Method("no guidance", 1.0, negative=False), prompts, None, seed)
    nag = drawn(pipe, Method("NAG 3, 2.5, 0.5", 0.0, (NAG(),)), prompts, negatives, seed)
    table = [_figures(pipe, "no guidance", None, plain, None, None, told)]
    for scale in scales:
        exact = drawn(pipe, Method("guidance", scale), prompts, negatives, seed)
        table.append(_figures(pipe, "NAG 3, 2.5, 0.5", scale, nag, exact, plain, told))
        for method in methods(adapter, scale):
            found = exact if method.label == "guidance" else drawn(pipe, method, prompts, negatives, seed)
            table.append(_figures(pipe, method.label, scale, found, exact, plain, told))
    return table


def _figures(
    pipe: Any,
    label: str,
    scale: float | None,
    found: Drawn,
    exact: Drawn | None,
    plain: Drawn | None,
    told: Sequence[Case],
) -> dict[str, Any]:
    far = None
    if exact is not None and plain is not None:
        far = float(
            (found.latents - exact.latents).square().sum() / (plain.latents - exact.latents).square().sum()
        )
    judged = judge(decode(pipe, found.latents), told)
    return {"method": label, "scale": scale, "rows": found.rows, **asdict(judged), "distance": far}


def right_pictures(pipe: Any, adapter: Any, count: int, scales: Sequence[float]) -> list[dict[str, Any]]:
    """Return the share of right pictures of test prompts without a negative prompt."""
    prompts = sample_prompts(count, seed=0, kind="mixed", split="test")
    ways = [Method("no guidance", 1.0), Method("guidance", 5.0)]
    ways += [Method("adapter", scale, (SpeedUpNet(adapter),), sun=True) for scale in scales]
    table = []
    for way in ways:
        found = drawn(pipe, way, prompts, None)
        grades = grade(decode(pipe, found.latents), prompts)
        strict, score = float(grades.strict.mean()), float(grades.score.mean())
        table.append(
            {"method": way.label, "scale": way.scale, "rows": found.rows, "strict": strict, "score": score}
        )
    return table


def in_four(pipe: Any, adapter: Any, told: Sequence[Case], seed: int) -> list[dict[str, Any]]:
    """Return how the distilled student obeys at 4 evaluations a picture, without guidance."""
    prompts, negatives = [case.prompt for case in told], [case.negative for case in told]
    sun = SpeedUpNet(adapter, guidance_scale=5.0)
    table = []
    ways: dict[str, Any] = {"student": (), "student, NAG": (NAG(5.0),), "student, adapter at 5": (sun,)}
    for label, plugs in ways.items():
        given = {"negative_prompt": negatives} if plugs else {}
        seeds = Seeds([seed + i for i in range(len(told))])
        with plug(pipe, FewStep("shapes", steps=4), *plugs, seeds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the student's weights are not those that the adapter knows
            images = pipe(prompts, output_type="pt", **given).images
        table.append({"method": label, "evaluations": 4, **asdict(judge(images, told))})
    return table


def gaps(pipe: Any, adapter: Any, scales: Sequence[float], states: int) -> list[dict[str, float]]:
    """Return R of the adapter on noised renderings of test scenes, with real and with empty negatives.

    Real ones are of seven kinds, evenly: `negative_cases.kinds_of_negatives`.
    """
    from diffplug.training.shapes.negative_adapter import renderings
    from diffplug.training.speedupnet.adapter_score import score_adapter

    prompts, clean = renderings(pipe, states, "test", seed=0)
    negatives = kinds_of_negatives(prompts)
    told: dict[str, Any] = {"states": states, "runs": 48, "clean": clean}
    return [
        score_adapter(pipe, adapter, prompts, negatives, guidance=scale, **told).to_json() for scale in scales
    ]


def sheet(pipe: Any, adapter: Any, wanted: Sequence[Case], columns: int, path: Path) -> None:
    """Draw the same seeds by every method, for the first cases in which an empty negative draws the colour.

    A mark says that the colour is not there.
    """
    from torchvision.transforms.functional import to_pil_image

    from diffplug.demos.contact_sheet import Cell, contact_sheet
    from diffplug.shapes.grading import as_pixels, find

    sun = (SpeedUpNet(adapter),)
    ways = [
        Method("guidance, empty negative: 50 evaluations", 5.0, negative=False),
        Method("guidance with the negative: 50", 5.0),
        Method("NAG: 25", 0.0, (NAG(),)),
        Method("SpeedUpNet: 25", 5.0, sun),
        Method("SpeedUpNet that is not shown the negative: 25", 5.0, sun, negative=False),
    ]
    first = decode(pipe, drawn(pipe, ways[0], [case.prompt for case in wanted], None).latents)
    seen = find(as_pixels(first))
    pairs = zip(seen, wanted, strict=True)
    bad = [i for i, ((_, blobs), case) in enumerate(pairs) if any(b.color == case.negative for b in blobs)]
    chosen = bad[:columns]
    told = [wanted[i] for i in chosen]
    prompts, negatives = [case.prompt for case in told], [case.negative for case in told]
    rows = []
    for way in ways:
        images = decode(pipe, drawn(pipe, way, prompts, negatives, chosen).latents)
        seen = find(as_pixels(images))
        marks = [
            all(b.color != case.negative for b in blobs) for (_, blobs), case in zip(seen, told, strict=True)
        ]
        rows.append(
            [
                Cell([to_pil_image(image.clamp(0, 1))], [mark])
                for image, mark in zip(images, marks, strict=True)
            ]
        )
    made = contact_sheet(
        rows,
        row_labels=[way.label for way in ways],
        column_labels=[f"{case.prompt}, not {case.negative}" for case in told],
        size=96,
        footer="Shapes, DDIM in 25 steps, guidance 5, the same seeds; the first cases in which an empty "
        "negative draws the colour. A tick: it is not there",
    )
    save(made, path)


def text(table: Sequence[dict[str, Any]]) -> str:
    """Return rows of figures as a markdown table."""
    heads = list(table[0])
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cell(row[head]) for head in heads)} |" for row in table)])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, prints tables and writes them; or draws the sheet."""
    told = _parser().parse_args(arguments)
    if told.what == "toy":
        toy(told.out)
        return
    pipe = opened(told.model, told.device)
    if told.sheet is not None:
        output_folder(told.sheet.parent)
        sheet(pipe, told.adapter, cases(told.cases, told.seed), told.columns, told.sheet)
        return
    output_folder(told.json.parent)
    wanted = cases(told.cases, told.seed)
    document: dict[str, Any] = {"cases": told.cases, "seed": told.seed, "prompts": told.prompts}
    document["obedience"] = obedience(pipe, told.adapter, wanted, told.scales, told.seed * 10**6)
    print(text(document["obedience"]))
    document["in four"] = in_four(pipe, told.adapter, wanted, told.seed * 10**6)
    print(text(document["in four"]))
    if told.prompts:
        document["right"] = right_pictures(pipe, told.adapter, told.prompts, told.scales)
        print(text(document["right"]))
    if told.states:
        document["gap"] = gaps(pipe, told.adapter, told.scales, told.states)
        print(text(document["gap"]))
    write_json(told.json, document)
    print(told.json)


def toy(folder: Path) -> None:
    """Train and measure on the grid of sixteen points, and say which bars are met."""
    from benchmarks.negative_toy.table import measured

    torch.set_num_threads(1)
    document = measured(output_folder(folder))
    for name, table in document.items():
        if name != "bars":
            print(f"{name}\n\n{text(table)}\n")
    for bar, met in document["bars"].items():
        print(f"{bar}: {'met' if met else 'NOT MET'}")
    write_json(output_folder(RESULTS) / "negative_toy.json", document)


def _parser() -> argparse.ArgumentParser:
    parser = command(__name__, model="shapes")
    add = parser.add_argument
    add("what", nargs="?", choices=("shapes", "toy"), default="shapes")
    add("-o", "--out", type=Path, default=Path("runs/negative-toy"), help="where the toy trains")
    add("--adapter", type=Path, default=None, help="a file; without one, the shipped adapter")
    add("--scales", type=float, nargs="+", default=[5.0, 2.0, 8.0])
    add("--cases", type=int, default=60)
    add("--seed", type=int, default=0, help="of the cases")
    add("--prompts", type=int, default=200, help="test prompts without a negative prompt; 0 for none")
    add("--states", type=int, default=512, help="noised pictures for R; 0 for none")
    add("--json", type=Path, default=RESULTS / "negative_prompts.json")
    add("--sheet", type=Path, default=None, help="draw a sheet instead")
    add("--columns", type=int, default=6)
    return parser


if __name__ == "__main__":
    main()
