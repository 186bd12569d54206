"""What `moshi train` does: open what a recipe names, tell, train, and write the model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moshi_cli.console import Console
from moshi_cli.core.errors import MoshiError
from moshi_cli.core.files import write_text
from moshi_cli.session import BUILTIN
from moshi_cli.tasks import curves
from moshi_cli.tasks.recipes import Recipe, dump, load, plain

if TYPE_CHECKING:
    import torch

    from moshi_cli.tasks.assembly import Assembly
    from moshi_cli.tasks.train import Run

SHOWN = ("loss", "text", "audio", "mel", "critics")  # of the metrics, beside the bar
INTERRUPTED = 130


def settings(given: Sequence[str], short: Mapping[str, Any]) -> list[str]:
    """What --set says, and the options that are short for it."""
    return [*given, *(f"{key}={value}" for key, value in short.items() if value is not None)]


class Training:
    """One call of the command."""

    def __init__(
        self, recipe: str, given: Sequence[str], console: Console, *, resume: bool = False
    ) -> None:
        self.console, self.resume = console, resume
        self.recipe = load(recipe, given)
        if Path(recipe).is_dir() and not self.recipe.run.output:
            raise MoshiError(f"{recipe}: its config.yaml does not name the folder of the run")
        if self.recipe.run.threads:
            import torch

            torch.set_num_threads(self.recipe.run.threads)

    def show(self) -> None:
        """The whole recipe, and as comments what it trains, hears and needs."""
        from moshi_cli.core.weights import pick_device
        from moshi_cli.tasks.assembly import assemble

        device = pick_device(self.recipe.run.device)
        nothing_made = replace(self.recipe, run=replace(self.recipe.run, encode=False))
        assembly = assemble(nothing_made, device, BUILTIN)
        self.console.text(dump(self.recipe))
        for line in facts(assembly, self.recipe.folder):
            self.console.line(f"# {line}")

    def run(self, stop_after: int | None) -> int:
        """Train; exit code 130 if it was interrupted."""
        from moshi_cli.core.weights import pick_device
        from moshi_cli.tasks import parallel
        from moshi_cli.tasks.assembly import assemble
        from moshi_cli.tasks.train import train

        run, folder = self.recipe.run, self.recipe.folder
        with parallel.joined(pick_device(self.recipe.run.device)) as device:
            chief = parallel.rank() == 0
            console = self.console if chief else Console("train", quiet=True)
            self.refuse_another_run(folder)
            assembly = assemble(self.recipe, device, BUILTIN)
            if chief:
                self.begin(assembly, folder, device)
            told = Told(console, assembly, folder if run.tensorboard and chief else None)
            summary = train(
                assembly.stage, assembly.objective, folder, resume=self.resume,
                stop_after=stop_after, log_every=run.log_every, save_minutes=run.save_minutes,
                keep=run.keep, kind=run.parallel, report=told.report, tick=told.tick,
            )  # fmt: skip
            told.close()
            if chief:
                self.finish(summary.checkpoint, summary.progress, folder)
            return INTERRUPTED if summary.interrupted else 0

    def refuse_another_run(self, folder: Path) -> None:
        """MoshiError if the folder holds a run and this is to be another one."""
        from moshi_cli.tasks.checkpoints import checkpoints

        if checkpoints(folder) and not self.resume:
            raise MoshiError(f"{folder} already holds a run", "--resume it, or choose --output DIR")

    def begin(self, assembly: Assembly, folder: Path, device: torch.device) -> None:
        """Say what begins, and leave the recipe with the run."""
        from moshi_cli.tasks import parallel
        from moshi_cli.tasks.checkpoints import checkpoints

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        if path.is_file() and checkpoints(folder):
            for key, before, after in changes(load(str(path)), self.recipe):
                self.console.warn(f"{key} was {before!r} in this run and is {after!r} now")
        write_text(str(path), dump(self.recipe))
        hours = sum(assembly.data.values()) / 3600
        name, many = assembly.stage.name, parallel.world()
        where = f"{device}" + (f", {many} processes ({self.recipe.run.parallel})" * (many > 1))
        self.console.info(f"{name}: {assembly.model.name} on {where}, {hours:.2f} h in the mix")

    def finish(self, checkpoint: Path, progress: float, folder: Path) -> None:
        """Curves and the model; the path of what was written goes to stdout."""
        from moshi_cli.tasks.assembly import export

        if self.recipe.run.plot and curves.draw(folder) is None:
            self.console.debug("no losses.png: matplotlib is not installed, or nothing was logged")
        self.console.info(f"{checkpoint}: {progress:.1%} of the budget used")
        made = checkpoint
        if self.recipe.run.export and progress >= 1:
            made = export(self.recipe, checkpoint, folder / "model", BUILTIN)
        self.console.line(str(made))


def changes(before: Recipe, after: Recipe) -> list[tuple[str, Any, Any]]:
    """Entries of the stage and the model that differ: key, old and new value; None: not there."""
    old, new = (
        flat({"": plain(recipe.stage), "model": plain(recipe.model)}) for recipe in (before, after)
    )
    return [(k, old.get(k), new.get(k)) for k in old | new if old.get(k) != new.get(k)]


def flat(data: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = ".".join(part for part in (within, key) if part)
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def facts(assembly: Assembly, folder: Path) -> list[str]:
    """Parameters, what rests, data, memory and disk, a line each."""
    from moshi_cli.tasks.estimate import counts, need
    from moshi_cli.tasks.train import Run

    run = Run(assembly.stage, assembly.objective)
    lines = ["parameters, and how many of them learn:"]
    for name, (total, learning) in counts(run).items():
        rests = "" if learning else "  frozen" if total else ""
        lines.append(f"  {name:32}{total:>15,}{learning:>15,}{rests}")
    lines += ["data:"]
    lines += [f"  {name:48}{seconds / 3600:10.2f} h" for name, seconds in assembly.data.items()]
    n = need(assembly, run)
    parts = {
        "weights": n.weights, "gradients": n.gradients, "optimiser": n.optimizer,
        "average": n.average, "activations (about)": n.activations,
    }  # fmt: skip
    shown = ", ".join(f"{name} {gb(size)}" for name, size in parts.items() if size)
    lines.append(f"memory: {gb(n.total)}: {shown}")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    keep = assembly.recipe.run.keep
    lines.append(f"disk: {gb(n.checkpoint)} per checkpoint, {keep} are kept, {gb(free)} free")
    return lines


def gb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Told:
    """What is said while it trains: a bar, JSON lines for schedulers, or a line now and then."""

    def __init__(self, console: Console, assembly: Assembly, board: Path | None) -> None:
        self.console, self.stage = console, assembly.stage
        self.board = None if board is None else curves.board(board)
        self.last: dict[str, float] = {}
        self.began: tuple[float, float] | None = None  # progress and time of the first step
        self.bar: Any = None
        if console.progress_mode == "always":
            from tqdm import tqdm

            self.bar = tqdm(
                total=100.0, unit="%", leave=False, dynamic_ncols=True, mininterval=0.5,
                bar_format="{desc}{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]",
            )  # fmt: skip

    def tick(self, run: Run) -> None:
        """A step is done."""
        if self.began is None:
            self.began = (run.progress, time.monotonic())
        if self.bar is not None:
            many = "" if self.stage.minutes else f"/{self.stage.steps}"
            audio = f"  {run.audio_s / 3600:.2f} h" if run.audio_s else ""
            self.bar.set_description_str(f"step {run.step}{many}{audio} ", refresh=False)
            self.bar.update(100 * run.progress - self.bar.n)

    def report(self, line: dict[str, float]) -> None:
        """A line of metrics."""
        if self.board is not None:
            self.board(line)
        mode = self.console.progress_mode
        if self.bar is not None:
            shown = [f"{k} {line[k]:.3g}" for k in SHOWN if k in line]
            if "tokens_per_s" in line:
                shown.append(f"{line['tokens_per_s']:.0f} tok/s")
            self.bar.set_postfix_str("  ".join(shown))
        elif mode == "json":
            eta_s = self.eta(line)
            self.console.event(
                {"type": "progress", "steps": self.stage.steps, **line, "eta_s": eta_s}
            )
        else:
            hidden = ("progress", "elapsed_s")
            shown = [f"{k} {v:.4g}" for k, v in line.items() if k not in hidden]
            self.console.info("  ".join(shown))

    def eta(self, line: dict[str, float]) -> float | None:
        """Seconds that are left, at the pace so far."""
        if self.began is None or line["progress"] <= self.began[0]:
            return None
        pace = (time.monotonic() - self.began[1]) / (line["progress"] - self.began[0])
        return round(pace * (1 - line["progress"]), 1)

    def close(self) -> None:
        """The bar is gone."""
        if self.bar is not None:
            self.bar.close()
