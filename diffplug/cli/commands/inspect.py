"""`diffplug doctor` and `diffplug names`: what is here, and what there is."""

from __future__ import annotations

from typing import Annotated

import typer

from diffplug.cli.commands.few_step import print_few_step_names
from diffplug.cli.console import guarded, print_json, print_table
from diffplug.cli.options import Json


@guarded
def doctor(json: Json = False) -> None:
    """Print versions, devices, attention back ends, what is missing and the command that gets it.

    Example: `diffplug doctor`. The exit status is 1 where something needed is missing.
    """
    from diffplug.cli.environment import as_json, examine

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


@guarded
def names(
    few_step: Annotated[bool, typer.Option("--few-step", help="The few-step checkpoints instead.")] = False,
    json: Json = False,
) -> None:
    """Print the short names of models, samplers, steerers, rewards and trainers, or of few-step checkpoints.

    Example: `diffplug names --json`, `diffplug names --few-step`
    """
    if few_step:
        print_few_step_names(json)
        return
    from diffplug.registry import REWARDS, STEERERS, TRAINERS
    from diffplug.samplers import by_name as stock

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
