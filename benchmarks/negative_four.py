"""Negative prompts on the distilled four-step student of Shapes: NAG, and SpeedUpNet's two stages.

    python -m benchmarks.negative_four
    diffplug train speedupnet benchmarks/negative_four.toml -o runs/four      the second stage, which ships
    python -m benchmarks.negative_four --second runs/four/student/speedupnet.safetensors

Four evaluations a picture, the same seeds for every way: how often an unwanted colour is drawn, whether
there are as many objects as asked for, and how many of other prompts are right in every fact without a
negative one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import command, opened
from benchmarks.negative_cases import cases, judge
from benchmarks.negative_prompts import text
from diffplug import plug
from diffplug.files import output_folder, write_json
from diffplug.loading import shapes_folder
from diffplug.samplers import NAG, FewStep, SpeedUpNet
from diffplug.seeds import Seeds
from diffplug.shapes import grade, sample_prompts

RESULTS, ROWS = Path(__file__).parent / "results", 40
SCALES = (2.0, 3.0, 5.0, 8.0)


def ways(second: Path | None, scales: Sequence[float]) -> dict[str, tuple[Any, ...]]:
    """Return the plugs of each way beside the student. second: another second stage than the shipped one."""
    first = shapes_folder().parent / "negative" / "speedupnet.safetensors"
    found: dict[str, tuple[Any, ...]] = {"student": (), "NAG (5)": (NAG(5.0),)}
    for label, file in (("first stage", first), ("second stage", second)):
        for scale in scales:
            found[f"{label} at {scale:g}"] = (SpeedUpNet(file, guidance_scale=scale),)
    return found


def drawn(pipe: Any, plugs: Sequence[Any], prompts: Sequence[str], negatives: Sequence[str] | None) -> Tensor:
    """Return the pictures [n, 3, H, W] of a way, picture i from seed i."""
    parts = []
    for begin in range(0, len(prompts), ROWS):
        some = list(prompts[begin : begin + ROWS])
        told = {} if negatives is None else {"negative_prompt": list(negatives[begin : begin + ROWS])}
        seeds = Seeds([begin + i for i in range(len(some))])
        with plug(pipe, FewStep("shapes", steps=4), *plugs, seeds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first stage does not know the student's weights
            parts.append(pipe(some, output_type="pt", **told).images)
    return torch.cat(parts)


def figures(pipe: Any, found: dict[str, tuple[Any, ...]], count: int, prompts: int) -> list[dict[str, Any]]:
    """Return a row for each way: cases with a negative prompt, and right pictures without one."""
    told = cases(count, seed=1)
    asked, unwanted = [case.prompt for case in told], [case.negative for case in told]
    free = sample_prompts(prompts, seed=0, kind="mixed", split="test")
    table = []
    for label, plugs in found.items():
        obeyed = judge(drawn(pipe, plugs, asked, unwanted if plugs else None), told)
        right = float(grade(drawn(pipe, plugs, free, None), free).strict.mean())
        table.append({"way": label, **asdict(obeyed), "right without": right})
        print(text(table[-1:]).splitlines()[-1], flush=True)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write it."""
    parser = command(__name__)
    parser.add_argument("--second", type=Path, help="adapter of a second stage, in place of the shipped one")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--prompts", type=int, default=200)
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    table = figures(opened("shapes", "cpu"), ways(told.second, told.scales), told.cases, told.prompts)
    document = {"cases": told.cases, "prompts": told.prompts, "rows": table}
    write_json(output_folder(RESULTS) / "negative_four.json", document)
    print(text(table))


if __name__ == "__main__":
    main()
