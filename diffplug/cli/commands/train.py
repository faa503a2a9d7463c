"""`diffplug train`: tunes a model by a method, from a config file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffplug.cli.console import guarded, print_json, until_stopped
from diffplug.cli.options import Device, Json
from diffplug.placing import device_of, hush

Method = Annotated[
    str, typer.Argument(help="trajectory, hyper-sd, tdm, one-step, ...: see `diffplug names`.")
]
Config = Annotated[
    Path | None,
    typer.Argument(
        help="TOML file, or a folder of pictures for finetune; without one, the method's defaults."
    ),
]
Tuner = Annotated[
    str | None, typer.Option(help="Which weights move: lora, full, sara, dora, oft, ... (tuner.kind).")
]
Pictures = Annotated[
    Path | None, typer.Option(help="Folder of pictures with captions (data.pictures), beside a TOML file.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, as optimizer.lr=1e-4; may be given often. The file's own tree."),
]
Output = Annotated[Path, typer.Option("--out", "-o", help="Folder of checkpoints, log and the student.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop, saved, after this long.")]
Cache = Annotated[Path, typer.Option(help="Folder of trajectories and latents, shared by runs.")]


@guarded
def train(
    method: Method,
    config: Config = None,
    tuner: Tuner = None,
    pictures: Pictures = None,
    changes: Set = None,
    out: Output = Path("runs/student"),
    resume: Resume = False,
    minutes: Minutes = None,
    cache: Cache = Path("runs/cache"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Tune a model by a method and a tuner, and write the weights with the recipe that runs them.

    A few-step student: `diffplug train trajectory --set student.steps=4 --set run.updates=200 -o runs/four`,
    then `diffplug generate "a red circle" --sampler runs/four/student`

    A style: `diffplug train finetune my-pictures --tuner sara -o runs/style` (a .txt beside each picture)

    Several GPUs: `accelerate launch -m diffplug train ...` with the same arguments.
    """
    hush()
    from diffplug.training.job import Job
    from diffplug.training.train import train as run

    config, own = _told(method, config, pictures, tuner)
    _check_contradictions(own, changes or [])
    job = Job.read(method, config, [*own, *(changes or [])], device=_device(device), cache=cache)
    with (
        until_stopped(f"what was reached is in {out}: repeat the command with --resume"),
        _shown(json) as tell,
    ):
        told = run(job, out, resume=resume, minutes=minutes, on_progress=tell)
    _tell(job, told, out, json=json)


def _check_contradictions(own: list[str], changes: list[str]) -> None:
    """Raise ValueError for a --set that says otherwise than an option of its own does."""
    told = dict(one.split("=", 1) for one in own)
    for change in changes:
        key, _, value = change.partition("=")
        said = told.get(key.strip(), value)
        if said.strip("\"'") != value.strip().strip("\"'"):
            name = key.strip()
            raise ValueError(f"--set {change} contradicts the option that says {name}={said}: leave one out")


def _told(
    method: str, config: Path | None, pictures: Path | None, tuner: str | None
) -> tuple[Path | None, list[str]]:
    """Return the config file, and the changes that folder and tuner stand for."""
    if config is not None and config.is_file() and config.suffix.lower() in _PICTURES:
        raise ValueError(f"{str(config)!r} is one picture: give the folder that it is in")
    meant = (
        method in _OF_PICTURES and config is not None and config.suffix != ".toml" and not config.is_file()
    )
    if config is not None and (meant or config.is_dir()):
        if pictures is not None:
            raise ValueError(f"two folders of pictures, {str(config)!r} and {str(pictures)!r}: give one")
        config, pictures = None, config
    own = [f"data.pictures={str(pictures)!r}"] if pictures is not None else []
    return config, [*own, *([f"tuner.kind={tuner}"] if tuner is not None else [])]


_OF_PICTURES = ("finetune", "choose")
"""Methods whose second word is a folder of pictures, unless it is a file."""

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")

_COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[figures]}", markup=False),
)


Tell = Callable[[str, int, int, Mapping[str, float]], None]

_EVERY = 60.0
"""Seconds between two lines where the error stream is no terminal."""


@contextmanager
def _shown(silent: bool) -> Iterator[Tell]:
    """Show on the error stream what is done: bars on a terminal, a line a minute where there is none."""
    console = Console(stderr=True)
    if silent or not console.is_terminal:
        yield (lambda *_: None) if silent else _liner()
        return
    with Progress(*_COLUMNS, console=console) as bars:
        yield _teller(bars)


def _teller(bars: Progress) -> Tell:
    """Return what draws a bar for each kind of work: trajectories, updates."""
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, figures="")
        bars.update(tasks[what], completed=done, figures=_figures(figures))

    return tell


def _liner(clock: Callable[[], float] = monotonic) -> Tell:
    """Return what writes a line a minute."""
    begun = last = clock()

    def tell(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        nonlocal last
        if (now := clock()) - last < _EVERY:
            return
        last = now
        line = f"{what}: {done} of {total} after {(now - begun) / 60:.0f} min  {_figures(figures)}"
        typer.echo(line.rstrip(), err=True)

    return tell


def _figures(figures: Mapping[str, float]) -> str:
    """Return loss and speed in words, as far as they are known."""
    told = (("loss", "loss {:.4g}"), ("rows_per_second", "{:.4g} images/s"))
    return "  ".join(form.format(figures[key]) for key, form in told if key in figures)


def _device(name: str) -> str:
    """Return the device; each process of a launch has its own."""
    if name == "auto":
        import torch

        if torch.cuda.is_available():
            from accelerate import PartialState

            return str(PartialState().device)
    return device_of(name)


def _tell(job: Any, told: Any, out: Path, *, json: bool) -> None:
    figures = None if told.figures is None else vars(told.figures)
    if json:
        student = None if told.student is None else str(told.student)
        print_json({"student": student, "updates": told.updates, "figures": figures, "seconds": told.seconds})
        return
    if told.student is None:
        typer.echo(f"stopped after {told.updates} updates and saved: the same command with --resume goes on")
        return
    if told.figures is not None:
        f, reward = told.figures, job.config.validation.reward
        typer.echo(f"{reward}: mean {f.mean:.3f} ± {f.error:.3f} on {f.n} pictures, {f.best:.1%} reach 1")
    if told.recipe is not None:
        from diffplug.training.output import plain_code as code

        typer.echo(f"\n{code(told.recipe, job.config.model, str(told.student))}\n")
    typer.echo(str(told.student))
