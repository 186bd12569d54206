"""`moshi models`: which models there are, and what one of them is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moshi_cli.options import Json, LogOptions, ModelOptions, group, spread

app = group("List models and describe one.")


@app.command("list")
@spread
def list_(*, json: Json = False, log: LogOptions) -> None:
    """The built-in model, the published ones, and what else the hub's cache holds."""
    from moshi_cli.model_facts import known_models

    console = log.console("models list")
    rows = known_models()
    if json:
        for row in rows:
            console.record(row)
        return
    table = [("name", "does", "size", "here")]
    for row in rows:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f} GB"
        table.append((row["name"], ", ".join(row["tasks"]), size, "yes" if row["here"] else "no"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        console.line("  ".join(cells).rstrip())


@app.command()
@spread
def info(
    name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for --model.", show_default=False)
    ] = None,
    *,
    json: Json = False,
    model: ModelOptions,
    log: LogOptions,
) -> None:
    """What a model does, how large it is, and under which licence it comes."""
    from moshi_cli.model_facts import describe
    from moshi_cli.session import model_place

    console = log.console("models info")
    place = name or model_place(model)
    facts: dict[str, Any] = describe(
        place, model.revision, builtin=name is None and model.model is None
    )
    if json:
        console.record(facts)
        return
    card = facts.pop("card")
    for key, value in facts.items():
        if value not in (None, "", [], {}):
            console.line(f"{key.replace('_', ' ') + ':':22}{shown(value)}")
    if card:
        console.line("\n" + card)


def shown(value: Any) -> str:
    """A fact in a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
