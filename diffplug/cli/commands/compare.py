"""`diffplug compare`: the same prompts and seeds through several recipes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffplug.cli import options as o
from diffplug.cli.console import guarded, print_json, print_table, progress, until_stopped
from diffplug.cli.named_samplers import Samplers, name_samplers
from diffplug.files import output_folder

if TYPE_CHECKING:
    from diffplug.demos.compare import Judge, Outcome
    from diffplug.making import Row
    from diffplug.recipe import Recipe
    from diffplug.recipe.batches import Batch


@guarded
def compare(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Else the demo's own.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="A recipe, key=value pairs; give it once per column.")
    ] = None,
    prompt_file: o.PromptFile = None,
    model: o.Model = "shapes",
    guidance: o.Guidance = None,
    width: o.Width = None,
    height: o.Height = None,
    seed: o.Seed = 0,
    images: o.Images = 2,
    judge: Annotated[
        str | None, typer.Option(help="Reward that judges, as for --reward; `shapes` on the Shapes model.")
    ] = None,
    batch: o.Batch = 16,
    samplers: Samplers = None,
    offload: o.Offload = "none",
    vae_tiling: o.VaeTiling = False,
    vae_slicing: o.VaeSlicing = False,
    out: o.Out = Path("out"),
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    json: o.Json = False,
) -> None:
    """Draw a contact sheet and a table: the same prompts and seeds through several recipes.

    Every picture is also a file, in a folder for each column.

    Example: `diffplug compare "a red circle" --run sampler=ddim,steps=50 --run sampler=dc-solver,steps=6`

    Keys: label, sampler, steps, guidance, negative_prompt, eta, width, height, steer, particles, reward,
    strength, options (of the steerer) and call (arguments of the pipeline), as in
    `--run "steer=fk,options='churn=1.0'"`; a value with a comma in it stands in quotes.
    """
    from diffplug.cli.pipeline import load_pipeline
    from diffplug.placing import Memory, device_of, dtype_of

    name_samplers(samplers)
    recipes = _recipes(run, guidance, width, height)
    words = _prompts(prompts, prompt_file)
    memory = Memory(offload, vae_tiling, vae_slicing)
    setup = {"model": model, "dtype": dtype_of(dtype, model, device_of(device))}
    asked = _judge(judge, model, words)
    rewards_in_use = _rewards(recipes, words)  # held, so that they are loaded once
    sheet = _Sheet(output_folder(out), out, words, images, seed, {**setup, "judge": judge}, recipes)
    pipe = load_pipeline(model, device, dtype, words, memory)
    with (
        until_stopped(sheet.stopped),
        progress([(r.label, len(words) * images) for r in recipes], disable=json) as advance,
    ):
        outcomes = sheet.fill(pipe, setup, batch, asked, advance)
    del rewards_in_use
    _tell(outcomes, sheet, json=json)


def _recipes(
    run: list[str] | None, guidance: float | None, width: int | None, height: int | None
) -> list[Recipe]:
    """Return the columns; guidance and size are for those that name none."""
    from diffplug.demos import compare as engine
    from diffplug.recipe import Recipe

    recipes = [Recipe.parse(text) for text in run] if run else engine.demo_recipes()
    if guidance is None and not run:
        guidance = engine.DEMO_GUIDANCE
    wanted: dict[str, Any] = {"guidance": guidance, "width": width, "height": height}
    return [
        replace(r, **{name: value for name, value in wanted.items() if getattr(r, name) is None})
        for r in recipes
    ]


def _prompts(prompts: list[str] | None, file: Path | None) -> list[str]:
    from diffplug.demos.compare import DEMO_PROMPTS
    from diffplug.recipe.prompt_file import check_prompt, read_prompts

    words = list(prompts or ())
    for number, text in enumerate(words, 1):
        check_prompt(f"prompt {number}", text)
    if file is not None:
        found = read_prompts(file)
        if any(prompt.negative is not None or prompt.seed is not None for prompt in found):
            raise ValueError(
                f"{str(file)!r}: a comparison takes prompts only, negative prompts go into --run"
            )
        words += [prompt.text for prompt in found]
    return words or list(DEMO_PROMPTS)


def _judge(name: str | None, model: str, words: list[str]) -> Judge | None:
    """Return who judges, with its networks loaded."""
    from diffplug.cli.asked import ready_reward
    from diffplug.demos import compare as engine

    if name is None:
        return engine.shapes_judge_for(words) if model == "shapes" else None
    ready_reward(name, words)
    return engine.judge(name)


def _rewards(recipes: list[Recipe], words: list[str]) -> list[Any]:
    from diffplug.cli.asked import ready_reward

    return [ready_reward(recipe.reward, words) for recipe in recipes if recipe.steer is not None]


@dataclass
class _Sheet:
    """The contact sheet and its pictures' files: what is done is on the disk."""

    folder: Path
    shown: Path
    words: list[str]
    images: int
    seed: int
    setup: dict[str, Any]
    recipes: list[Recipe]
    outcomes: list[Outcome] = field(default_factory=list)
    path: Path | None = None

    def fill(
        self, pipe: Any, setup: dict[str, Any], batch: int, judge: Judge | None, advance: Any
    ) -> list[Outcome]:
        """Return the outcomes; every batch is saved when it is done, and the sheet at the end."""
        from diffplug.demos import compare as engine
        from diffplug.making import Row

        slots = [prompt for prompt in self.words for _ in range(self.images)]
        rows = [
            [Row(recipe, prompt, self.seed + i, setup) for i, prompt in enumerate(slots)]
            for recipe in self.recipes
        ]

        def keep(column: int, done: Batch) -> None:
            self._save(column, rows[column], done)
            advance(column, done.prompts)

        engine.compare(
            pipe,
            self.words,
            self.recipes,
            images=self.images,
            seed=self.seed,
            judge=judge,
            max_rows=batch,
            on_batch=keep,
            on_step=advance.step,
            on_outcome=self.outcomes.append,
        )
        self.save()
        return self.outcomes

    def _save(self, column: int, rows: list[Row], done: Batch) -> None:
        from diffplug.making import save_batch

        folder = output_folder(self.folder / f"column-{column + 1}")
        for _ in save_batch(done, rows, folder):
            pass

    def save(self) -> None:
        """Write the sheet of the outcomes so far; a sheet of other settings keeps its name."""
        from diffplug.demos import compare as engine
        from diffplug.making.png import save_new_picture, save_png

        last = self.seed + len(self.words) * self.images - 1
        title = f"{self.setup['model']}: {len(self.words)} prompts, seeds {self.seed} to {last}"
        image = engine.sheet(self.outcomes, self.words, title=title)
        settings = {
            **self.setup,
            "prompts": self.words,
            "images": self.images,
            "seed": self.seed,
            "recipes": [outcome.recipe.settings() for outcome in self.outcomes],
        }
        path, fresh = save_new_picture(image, self.folder, "compare", settings)
        if not fresh:
            save_png(image, path, settings)
        self.path = self.shown / path.name

    def stopped(self) -> str:
        """Return what is done, with a sheet of it."""
        done = f"{len(self.outcomes)} of {len(self.recipes)} recipes are done, pictures are in {self.shown}"
        if self.outcomes:
            self.save()
            done += f", their sheet is {self.path}"
        return f"{done}; the same command begins anew"


def _tell(outcomes: list[Outcome], sheet: _Sheet, *, json: bool) -> None:
    rows = [outcome.row() for outcome in outcomes]
    if json:
        print_json({"rows": rows, "prompts": sheet.words, "seed": sheet.seed, "sheet": str(sheet.path)})
        return
    reached = ["reward"] if any("reward" in row for row in rows) else []
    columns = ["recipe", "strict", "score", *reached, "evaluations", "seconds"]
    print_table(columns, [_cells(row, columns) for row in rows], right=columns[1:])
    typer.echo(
        "strict: every fact of the prompt holds. evaluations: of the network, for each picture.\n"
        f"{sheet.path}"
    )


def _cells(row: dict[str, Any], columns: list[str]) -> list[str]:
    shown = {
        "recipe": row["label"],
        "strict": f"{row['strict']:.0%}" if "strict" in row else "-",
        "score": f"{row['score']:.3f}" if "score" in row else "-",
        "reward": f"{row['reward']:.3f}" if "reward" in row else "-",
        "evaluations": f"{row['evaluations']:.0f}",
        "seconds": f"{row['seconds']:.1f}",
    }
    return [shown[column] for column in columns]
