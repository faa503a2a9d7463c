"""`diffplug ...`: the command line. Torch and the wings load only in the commands that need them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

import diffplug
from diffplug import cli_few_step, cli_search, cli_train
from diffplug.cli_options import Device, Dtype, Guidance, Json, Model
from diffplug.console import guarded, hush, print_json, print_table, progress
from diffplug.files import output_folder
from diffplug.registry import unknown

app = typer.Typer(
    name="diffplug",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make Diffusers pipelines faster, steered or tuned.",
)
app.add_typer(cli_search.app, name="search")
app.command()(cli_few_step.recipe)
app.command("train")(cli_train.train)

Seed = Annotated[
    int, typer.Option(min=0, max=2**62, help="Seed of the first picture; the next ones count up.")
]
Images = Annotated[int, typer.Option("--images", "-n", min=1, max=10_000, help="Pictures for each prompt.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if missing.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", help="What the picture should not show.")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Make Diffusers pipelines faster, steered or tuned."""
    if version:
        typer.echo(diffplug.__version__)
        raise typer.Exit


@app.command()
@guarded
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    model: Model = "shapes",
    sampler: Annotated[
        str | None, typer.Option(help="A name from `diffplug names`, or a searched .json file.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Guidance = None,
    negative_prompt: Negative = None,
    eta: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Noise of DDIM's steps: 0 none, 1 as in DDPM."),
    ] = None,
    seed: Seed = 0,
    images: Images = 1,
    steer: Annotated[
        str | None,
        typer.Option(
            help="Choose among particles by a reward: fk, svdd, best-of-n, ...; see `diffplug names`."
        ),
    ] = None,
    particles: Annotated[int, typer.Option(min=1, max=4096, help="Particles for each picture.")] = 8,
    reward: Annotated[
        str, typer.Option(help="What steering asks for: a name from `diffplug names`, or 0.7*clip+0.3*jpeg.")
    ] = "shapes",
    strength: Annotated[float | None, typer.Option(min=0, help="How much the reward counts.")] = None,
    out: Out = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Makes pictures, one PNG file each, named by the seed that made it.

    Example: `diffplug generate "a red circle left of a blue square" --sampler dc-solver --steps 6 -o out`

    Steered: `diffplug generate "a green cross" --sampler ddim --steer fk --particles 8`
    """
    from diffplug.recipe import Recipe

    _refuse_idle(steer, particles=particles, reward=reward, strength=strength)
    recipe = Recipe(
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        eta=eta,
        steer=steer,
        particles=particles,
        reward=reward,
        strength=strength,
    )
    folder = output_folder(out)
    pipe = _pipe(model, device, dtype, prompts)
    recipe = recipe.settled(pipe)
    slots = [prompt for prompt in prompts for _ in range(images)]
    seeds = [seed + i for i in range(len(slots))]
    with progress([("pictures", len(slots))], disable=json) as advance:
        made = recipe.run(pipe, slots, seeds, on_batch=lambda n: advance(0, n))
    rows = _saved(made.images, slots, seeds, folder, {"model": model, **recipe.settings()})
    cost = {"evaluations": made.evaluations / len(slots), "seconds": made.seconds}
    if json:
        print_json({"pictures": rows, **cost})
        return
    print_table(
        ["file", "seed", "prompt"], [[r["file"], str(r["seed"]), r["prompt"]] for r in rows], right=["seed"]
    )
    if recipe.eta != eta:
        typer.echo(f"{steer} copies particles, which part in the noise of DDIM's steps: eta {recipe.eta:g}")
    elif "churn" in recipe.options:
        churn = recipe.options["churn"]
        typer.echo(
            f"{steer} copies particles, which part in noise added where they are scored: churn {churn:g}"
        )
    typer.echo(f"{cost['evaluations']:.0f} network evaluations for each picture, {made.seconds:.1f} s in all")


@app.command()
@guarded
def compare(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Else the demo's own.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A recipe, key=value pairs; give it once per column.")
    ] = None,
    model: Model = "shapes",
    guidance: Guidance = None,
    seed: Seed = 0,
    images: Images = 2,
    judge: Annotated[
        str | None, typer.Option(help="Reward that judges, as for --reward; `shapes` on the Shapes model.")
    ] = None,
    out: Out = Path("out"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Sends the same prompts and seeds through several recipes: a contact sheet and a table.

    Example: `diffplug compare "a red circle" --run sampler=ddim,steps=50 --run sampler=dc-solver,steps=6`

    Keys: label, sampler, steps, guidance, negative_prompt, eta, steer, particles, reward, strength.
    """
    from dataclasses import replace

    from diffplug.recipe import Recipe

    engine = _engine()
    recipes = [Recipe.parse(text) for text in run] if run else engine.demo_recipes()
    if guidance is None and not run:
        guidance = engine.DEMO_GUIDANCE
    recipes = [replace(r, guidance=guidance if r.guidance is None else r.guidance) for r in recipes]
    folder = output_folder(out)
    words = list(prompts or engine.DEMO_PROMPTS)
    pipe = _pipe(model, device, dtype, words)
    asked = engine.judge(judge) if judge else engine.shapes_judge_for(words) if model == "shapes" else None
    with progress([(r.label, len(words) * images) for r in recipes], disable=json) as advance:
        outcomes = engine.compare(
            pipe,
            words,
            recipes,
            images=images,
            seed=seed,
            judge=asked,
            on_batch=advance,
        )
    title = f"{model}: {len(words)} prompts, seeds {seed} to {seed + len(words) * images - 1}"
    path = _save_sheet(engine.sheet(outcomes, words, title=title), folder, outcomes)
    rows = [outcome.row() for outcome in outcomes]
    if json:
        print_json({"rows": rows, "prompts": words, "seed": seed, "sheet": str(path)})
        return
    columns = ["recipe", "strict", "score", "evaluations", "seconds"]
    print_table(columns, [_cells(row) for row in rows], right=columns[1:])
    typer.echo(
        f"strict: every fact of the prompt holds. evaluations: of the network, for each picture.\n{path}"
    )


@app.command()
@guarded
def doctor(json: Json = False) -> None:
    """Tells versions, devices, attention back ends, what is missing and the command that gets it.

    Example: `diffplug doctor`. The exit status is 1 where something needed is missing.
    """
    from diffplug.doctor import as_json, examine

    findings = examine()
    healthy = all(finding.ok is not False for finding in findings)
    if json:
        print_json({"healthy": healthy, "findings": as_json(findings)})
    else:
        mark = {True: "ok", False: "MISSING", None: ""}
        print_table(
            ["topic", "name", "", "state"], [[f.topic, f.name, mark[f.ok], f.state] for f in findings]
        )
        typer.echo("".join(f"\n{f.name}: {f.remedy}" for f in findings if f.remedy) + "\n")
        typer.echo("Everything needed is here." if healthy else "Something needed is missing: see above.")
    if not healthy:
        raise typer.Exit(1)


@app.command()
@guarded
def names(
    few_step: Annotated[bool, typer.Option("--few-step", help="The few-step checkpoints instead.")] = False,
    json: Json = False,
) -> None:
    """Lists the short names of models, samplers, steerers, rewards and trainers, or of few-step checkpoints.

    Example: `diffplug names --json`, `diffplug names --few-step`
    """
    if few_step:
        return cli_few_step.print_few_step_names(json)
    from diffplug import stock
    from diffplug.registry import REWARDS, STEERERS, TRAINERS

    found = {
        "models": ["shapes"],
        "samplers": stock.names(),
        "steerers": STEERERS.names(),
        "rewards": REWARDS.names(),
        "trainers": TRAINERS.names(),
    }
    if json:
        print_json(found)
    else:
        print_table(
            ["kind", "names"], [[kind, ", ".join(entries) or "none yet"] for kind, entries in found.items()]
        )


def _refuse_idle(steer: str | None, **options: Any) -> None:
    """ValueError for options of steering that were given without --steer, where they would do nothing."""
    from diffplug.recipe import Recipe

    for name, value in options.items():
        if steer is None and value != getattr(Recipe, name):
            raise ValueError(f"--{name} {value} acts only with --steer: add --steer fk, or leave it out")


def _engine() -> Any:
    """The comparison engine; the command line is the one module here that hands work to the demos."""
    from importlib import import_module

    return import_module("diffplug.demos.compare")


def _pipe(model: str, device: str, dtype: str, prompts: list[str]) -> Any:
    """The pipeline on its device; warns of words that the Shapes model has never seen."""
    hush()
    where = _device(device)
    pipe = diffplug.load(model, **_dtype(dtype, small=model == "shapes" or where == "cpu"))
    if model == "shapes":
        _warn_of_unknown_words(prompts)
    return pipe.to(where)


def _dtype(name: str, *, small: bool) -> dict[str, Any]:
    """What `load` needs to know: nothing for float32; auto is bfloat16 where the model is not small."""
    import torch

    known = ["auto", "bfloat16", "float16", "float32"]
    if name not in known:
        raise unknown("dtype", name, known)
    name = {"auto": "float32" if small else "bfloat16"}.get(name, name)
    return {} if name == "float32" else {"dtype": getattr(torch, name)}


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def _warn_of_unknown_words(prompts: list[str]) -> None:
    from diffplug.shapes import unknown_words

    for prompt in prompts:
        if words := unknown_words(prompt):
            warnings.warn(f"the Shapes model does not know {', '.join(words)} (in {prompt!r})", stacklevel=2)


def _saved(
    pictures: list[Any], prompts: list[str], seeds: list[int], folder: Path, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from diffplug.png import save_picture

    rows = []
    for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True):
        path = save_picture(picture, folder, seed, {"prompt": prompt, **settings})
        rows.append({"file": str(path), "seed": seed, "prompt": prompt})
    return rows


def _save_sheet(image: Any, folder: Path, outcomes: list[Any]) -> Path:
    from diffplug.files import safe_join
    from diffplug.png import save_png

    path = safe_join(folder, "compare.png")
    save_png(image, path, {"recipes": [outcome.recipe.settings() for outcome in outcomes]})
    return path


def _cells(row: dict[str, Any]) -> list[str]:
    strict = f"{row['strict']:.0%}" if "strict" in row else "-"
    score = f"{row['score']:.3f}" if "score" in row else "-"
    return [row["label"], strict, score, f"{row['evaluations']:.0f}", f"{row['seconds']:.1f}"]


if __name__ == "__main__":
    app()
