"""`diffplug generate`: pictures, one file each, on the disk as soon as they are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffplug.cli import options as o
from diffplug.cli.boundary import sentence
from diffplug.cli.console import guarded, print_json, print_table, progress, until_stopped
from diffplug.cli.named_samplers import Samplers, name_samplers
from diffplug.files import output_folder

if TYPE_CHECKING:
    from diffplug.making import Finished, Folder, Row


@guarded
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts.")
    ] = None,
    prompt_file: o.PromptFile = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Picture whose settings are taken where no option says otherwise."),
    ] = None,
    model: o.Model = "shapes",
    sampler: o.Sampler = None,
    samplers: Samplers = None,
    steps: o.Steps = 20,
    guidance: o.Guidance = None,
    negative_prompt: o.Negative = None,
    eta: o.Eta = None,
    width: o.Width = None,
    height: o.Height = None,
    seed: o.Seed = 0,
    images: o.Images = 1,
    steer: o.Steer = None,
    particles: o.Particles = 8,
    reward: o.Reward = "shapes",
    strength: o.Strength = None,
    option: o.Option = None,
    returns: Annotated[
        str | None, typer.Option(help="Which particles become files: best, sample (by their weights), all.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="PNG file for a plot of each steered run; needs matplotlib.")
    ] = None,
    batch: o.Batch = 16,
    again: Annotated[
        bool, typer.Option("--again", help="Make pictures once more that are in the folder already.")
    ] = False,
    offload: o.Offload = "none",
    vae_tiling: o.VaeTiling = False,
    vae_slicing: o.VaeSlicing = False,
    out: o.Out = Path("out"),
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    json: o.Json = False,
) -> None:
    """Make pictures, one PNG file each, named by the seed that made it.

    The same command again makes only what is missing, so a run that was stopped goes on.

    Example: `diffplug generate "a red circle left of a blue square" --sampler dc-solver --steps 6 -o out`

    Steered: `diffplug generate "a green cross" --sampler ddim --steer fk --particles 8`
    """
    from diffplug.cli.asked import Asked

    name_samplers(samplers)
    asked = Asked.of(context, source)
    rows, memory = asked.rows(prompts or [], prompt_file), asked.memory()
    plots = _Plots.of(report, steer=asked.recipe.steer)
    reward_in_use = asked.ready_reward([row.prompt for row in rows])  # held, so that it is loaded once
    job = _Job(rows, output_folder(out), out)
    if again or job.missing():
        pipe = asked.load(rows, memory)
        job.run(pipe, batch=batch, again=again, silent=json, plots=plots)
    del reward_in_use
    job.tell_as_json() if json else job.tell()


@dataclass
class _Job:
    """The rows of a command, the folder they go to, and what was made."""

    rows: list[Row]
    folder: Path
    shown: Path
    found: dict[int, list[Finished]] = field(default_factory=dict)
    seconds: float = 0.0

    @cached_property
    def before(self) -> Folder:
        """Return the folder as it was found."""
        from diffplug.making import Folder

        return Folder(self.folder)

    @property
    def evaluations(self) -> float:
        """Return the mean of the network evaluations of the pictures that were made."""
        return fmean(each[0].evaluations for each in self.found.values()) if self.found else 0.0

    def missing(self) -> list[int]:
        """Return the places of rows without a file."""
        return [place for place, row in enumerate(self.rows) if self.before.find(row) is None]

    def run(self, pipe: Any, *, batch: int, again: bool, silent: bool, plots: _Plots | None) -> None:
        """Make what is missing; each picture is on the disk when its batch is done."""
        from diffplug.making import make

        todo, start = len(self.rows if again else self.missing()), perf_counter()
        with (
            until_stopped(lambda: f"{self.state(todo)}; the same command goes on with the rest"),
            progress([("pictures", todo)], disable=silent) as advance,
            self._keeping(todo),
        ):
            steps = lambda done, of: advance.step(0, done, of)  # noqa: E731
            for one in make(pipe, self.rows, self.folder, max_rows=batch, again=again, on_step=steps):
                advance(0, one.place not in self.found)
                self.found.setdefault(one.place, []).append(one)
                if plots is not None:
                    plots.add(one.report)
        self.seconds = perf_counter() - start

    def state(self, todo: int) -> str:
        """Return how many pictures are there, in words."""
        before = len(self.rows) - todo
        return f"{before + len(self.found)} of {len(self.rows)} pictures are in {self.shown}"

    @contextmanager
    def _keeping(self, todo: int) -> Iterator[None]:
        """Errors in the block say what is there all the same."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if not self.found or isinstance(error, typer.Exit):
                raise
            raise ValueError(f"{sentence(error)} [{self.state(todo)}]") from error

    def pictures(self) -> list[dict[str, Any]]:
        """Return every picture of the job, in the order asked for."""
        return [entry for place in range(len(self.rows)) for entry in self._of(place)]

    def _of(self, place: int) -> list[dict[str, Any]]:
        row = self.rows[place]
        if place in self.found:
            found = [(one.path, one.reward, one.fresh) for one in self.found[place]]
        else:
            found = [(path, _reward(path), False) for path in self.before.find(row) or []]
        common = {"seed": row.seed, "prompt": row.prompt}
        told = [{"file": str(self.shown / path.name), **common, "made": fresh} for path, _, fresh in found]
        if row.recipe.steer is not None:
            told = [{**entry, "reward": reward} for entry, (_, reward, _) in zip(told, found, strict=True)]
        return told

    def tell_as_json(self) -> None:
        """Print one JSON document."""
        print_json({"pictures": self.pictures(), "evaluations": self.evaluations, "seconds": self.seconds})

    def tell(self) -> None:
        """Print the table, and what it cost."""
        pictures = self.pictures()
        columns = ["file", "seed", *(["reward"] if "reward" in pictures[0] else []), "prompt"]
        print_table(columns, [[_cell(row[key]) for key in columns] for row in pictures], right=columns[1:-1])
        fresh = sum(entry["made"] for entry in pictures)
        if fresh < len(pictures):
            typer.echo(
                f"{len(pictures) - fresh} of {len(pictures)} pictures were there already "
                "(--again makes others)"
            )
        for line in filter(None, (_noise_line(pictures[-1]["file"]), _why_line(pictures[-1]["file"]))):
            typer.echo(line)
        if fresh:
            typer.echo(
                f"{self.evaluations:.0f} network evaluations for each picture, {self.seconds:.1f} s in all"
            )


@dataclass
class _Plots:
    """Plots of steered runs: run.png, run-2.png, ..., one for each picture."""

    path: Path
    seen: list[Any] = field(default_factory=list)
    written: int = 0

    @classmethod
    def of(cls, path: Path | None, *, steer: str | None) -> _Plots | None:
        """Return the plots that were asked for; ValueError where there can be none."""
        from importlib.util import find_spec

        if path is None:
            return None
        if steer is None:
            raise ValueError("--report shows steered runs: add --steer fk, or leave it out")
        if path.suffix.lower() != ".png":
            raise ValueError(f"--report {str(path)!r}: give the name of a .png file")
        if find_spec("matplotlib") is None:
            raise ValueError('--report needs matplotlib: pip install "diffplug[search]"')
        output_folder(path.parent)
        return cls(path)

    def add(self, report: Any) -> None:
        """Write the plots of a report that is new."""
        import io

        from diffplug.files import atomic_write

        if any(report is one for one in self.seen):
            return
        self.seen = [report]
        for prompt in range(len(report.prompts)):
            self.written += 1
            number = "" if self.written == 1 else f"-{self.written}"
            buffer = io.BytesIO()
            report.plot(prompt).savefig(buffer, format="png")
            atomic_write(self.path.with_name(f"{self.path.stem}{number}.png"), buffer.getvalue())


def _reward(path: Path) -> float | None:
    """Return the reward that a picture's file says it reached."""
    from diffplug.making.png import read_settings

    return next(iter(read_settings(path).get("rewards", {}).values()), None)


def _noise_line(path: str) -> str:
    """Return the noise that a steered run was given without having been asked for; empty for others."""
    from diffplug.making.png import read_settings

    settings = read_settings(path)
    noise = settings["used"].get("noise", "")
    given = "adds none by itself" in noise
    return f"{settings['steer']} duplicates particles, which part in noise: {noise}" if given else ""


def _why_line(path: str) -> str:
    """Return why `--steer auto` took the rule that it took; empty for others."""
    from diffplug.making.png import read_settings

    return str(read_settings(path)["used"].get("why", ""))


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else str(value)
