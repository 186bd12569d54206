"""What `moshi eval lm` and `moshi eval pairs` do: batches of scenes or pairs, and their rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moshi_cli.batch import Result
from moshi_cli.console import Console
from moshi_cli.core.errors import InputError, ModelError, UsageError
from moshi_cli.eval_items import distinct
from moshi_cli.eval_jobs import Evaluation
from moshi_cli.eval_options import EvalOptions
from moshi_cli.inputs import Item
from moshi_cli.options import ModelOptions
from moshi_cli.slots import details

if TYPE_CHECKING:
    from moshi_cli.core.weights import Model
    from moshi_cli.tasks.likelihood import Examiner, Place, Scene
    from moshi_cli.tasks.pair_suites import Pair, Side
    from moshi_cli.tasks.pairs import Judge

T = TypeVar("T")
Opener = Callable[[], "Model"]


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    source = iter(items)
    while group := list(islice(source, size)):
        yield group


def speaking(opened: Opener) -> Model:
    """The model. ModelError if it is a codec alone."""
    model = opened()
    if model.lm is None or model.text is None:
        raise ModelError(f"{model.name}: is a codec, it has no language model")
    return model


# lm -----------------------------------------------------------------------------------------------


def lm(
    data: Sequence[str],
    options: EvalOptions,
    console: Console,
    opened: Opener,
    model_options: ModelOptions,
    *,
    tasks: Sequence[str],
    window_s: float,
    kinds: Sequence[str],
    skip: Sequence[str],
    layout: str,
    words: bool,
) -> int:
    """Nats of every token that each task predicts."""
    from moshi_cli.tasks.likelihood import Examiner, figures, tasks_of

    model = speaking(opened)
    assert model.lm is not None and model.text is not None
    found = tasks_of(model.config, tasks)
    examiners = {
        name: Examiner(model.lm, model.text, task, ahead=model.config.ahead)
        for name, task in found.items()
    }
    listed = places(data, model, layout, window_s, kinds, skip, words)
    examiners = fitting(examiners, listed, words, bool(tasks), console)
    items = distinct([item_of(place) for place in listed])
    known = [f"{name}_*_{measure}" for name in examiners for measure in ("nll", "ppl")]
    run = Evaluation("lm", items, options, console, known=known)
    by_id = {item.id: place for item, place in zip(items, listed, strict=True)}

    def work(items: Iterator[Item]) -> Iterator[Result]:
        for group in grouped(items, options.batch_size):
            began = time.monotonic()
            scenes: dict[str, Scene] = {}
            for item in group:
                try:
                    scenes[item.id] = by_id[item.id].scene()
                except InputError as error:
                    yield Result(item, error=error)
            nats = judged(examiners, scenes)
            for item in group:
                if item.id not in scenes:
                    continue
                seconds = by_id[item.id].seconds
                run.advance(seconds)
                spent = (time.monotonic() - began) / len(group)
                yield Result(item, [], seconds, spent, fields=row_of(nats[item.id]))

    context = details(model, model_options) | {
        "tasks": {name: {"lag_s": examiners[name].task.lag_s} for name in examiners},
        "window_s": window_s, "layout": layout, "words": words, "data": list(data),
    }  # fmt: skip
    settings = {key: value for key, value in context.items() if key != "data"}
    run(work, settings, model.revision)
    return run.finish(lambda: figures(run.good()), context)


def places(
    data: Sequence[str],
    model: Model,
    layout: str,
    window_s: float,
    kinds: Sequence[str],
    skip: Sequence[str],
    words: bool,
) -> list[Place]:
    """Everything there is to judge, in order. InputError for a manifest that cannot be used."""
    from moshi_cli.tasks.cache import Cache, is_cache
    from moshi_cli.tasks.likelihood import cached, recorded
    from moshi_cli.tasks.manifest import load_data

    listed: list[Place] = []
    for place in data:
        if is_cache(place):
            refuse_other_codecs(Path(place), model)
            width = 2 * model.lm.config.residual if model.lm is not None else 0
            cache = Cache(place, model.mimi.num_codebooks, width)
            takes = (
                t for t in cache.takes
                if t.kind.startswith(tuple(kinds) or "") and not t.kind.startswith(tuple(skip))
            )  # fmt: skip
            listed += cached(cache, takes, window_s)
        else:
            recordings = load_data([place], layout, words=words).recordings
            listed += recorded(recordings, model.mimi, layout, window_s, words=words)
    if not listed:
        raise UsageError("there is nothing to judge", "does --kind fit the takes?")
    return listed


def refuse_other_codecs(place: Path, model: Model) -> None:
    """ModelError if codes were made by another codec than the model's; old caches do not say."""
    from moshi_cli.tasks.cache import read_facts, shards

    own = model.mimi.fingerprint
    for folder in shards(place):
        codec = read_facts(folder).get("codec") or own
        if codec != own:
            raise ModelError(
                f"{folder}: its codes are of another codec ({codec}) than the model's ({own})",
                "encode the recordings with this model",
            )


def fitting(
    examiners: dict[str, Examiner],
    listed: Sequence[Place],
    words: bool,
    asked: bool,
    console: Console,
) -> dict[str, Examiner]:
    """The tasks that some of the data is for; UsageError if none is, or one that was asked for."""
    wrong = {}
    for name, examiner in examiners.items():
        if examiner.two and all(place.lines < 2 for place in listed):
            wrong[name] = "needs the voices of two people, a line each"
        elif examiner.writes and not words:
            wrong[name] = "predicts words alone, and there are none"
    if wrong and (asked or len(wrong) == len(examiners)):
        raise UsageError("; ".join(f"{name} {reason}" for name, reason in wrong.items()))
    for name, reason in wrong.items():
        console.info(f"not judged: {name} {reason}")
    return {name: examiner for name, examiner in examiners.items() if name not in wrong}


def item_of(place: Place) -> Item:
    """A place as an item; what tells its content from another is in its record."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in place.id)
    source = None if place.source is None else str(place.source)
    return Item(place.id, source, name, {"seconds": place.seconds, **place.facts})


def judged(examiners: dict[str, Examiner], scenes: dict[str, Scene]) -> dict[str, dict[str, Any]]:
    """Id -> task -> kind of token -> nats, tokens."""
    found: dict[str, dict[str, Any]] = {id: {} for id in scenes}
    for name, examiner in examiners.items():
        some = {id: s for id, s in scenes.items() if len(s.codes) > 1 or not examiner.two}
        if some:
            for id, sums in zip(some, examiner.examine(list(some.values())), strict=True):
                found[id][name] = {kind: list(pair) for kind, pair in sums.items()}
    return found


def row_of(nats: dict[str, Any]) -> dict[str, Any]:
    """What a row says: all sums, and the two means of a task that one looks at."""
    means = {
        f"{task}_{kind}_nll": kinds[kind][0] / kinds[kind][1]
        for task, kinds in nats.items()
        for kind in ("words", "audio")
        if kind in kinds
    }
    return {"nats": nats, **means}


# pairs --------------------------------------------------------------------------------------------


def pairs(
    suite: str,
    options: EvalOptions,
    console: Console,
    opened: Opener,
    model_options: ModelOptions,
    *,
    by_length: bool,
    semantic: float,
    acoustic: float,
) -> int:
    """Which side of each pair is likelier."""
    from moshi_cli.core.losses import LmWeights
    from moshi_cli.tasks.pair_suites import read_suite
    from moshi_cli.tasks.pairs import Judge, figures, right

    listed = read_suite(suite)
    items = distinct([pair_item(pair) for pair in listed])
    run = Evaluation("pairs", items, options, console, known=["accuracy", "accuracy_*", "margin"])
    by_id = {item.id: pair for item, pair in zip(items, listed, strict=True)}
    model = speaking(opened)
    assert model.lm is not None and model.text is not None
    weights = LmWeights(semantic=semantic, acoustic=acoustic)
    judge = Judge(model.lm, model.text, model.mimi, weights)

    def work(items: Iterator[Item]) -> Iterator[Result]:
        for group in grouped(items, options.batch_size):
            began = time.monotonic()
            ready: dict[str, Any] = {}
            for item in group:
                try:
                    ready[item.id] = sides(judge, by_id[item.id])
                except InputError as error:
                    yield Result(item, error=error)
            batches = [batch for both in ready.values() for batch in both]
            scores = iter(judge.scores(batches) if batches else ())
            for item in group:
                if item.id in ready:
                    good, bad = next(scores), next(scores)
                    values = {"good_nll": -good.value(by_length), "bad_nll": -bad.value(by_length)}
                    fields = shown_sides(run, by_id[item.id]) | {
                        "right": right(good, bad, by_length), **values,
                        "margin": values["bad_nll"] - values["good_nll"],
                    }  # fmt: skip
                    spent = (time.monotonic() - began) / len(group)
                    yield Result(item, [], 0.0, spent, fields=fields)

    context = details(model, model_options) | {
        "suite": suite, "score": "nats per token" if by_length else "nats",
        "weights": {"semantic": semantic, "acoustic": acoustic},
    }  # fmt: skip
    settings = {key: value for key, value in context.items() if key != "suite"}
    run(work, settings, model.revision)
    return run.finish(lambda: figures(run.good()), context)


def pair_item(pair: Pair) -> Item:
    """A pair as an item; a recording is known by its size and time."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in pair.id)
    record: dict[str, Any] = {}
    for key, side in (("good", pair.good), ("bad", pair.bad)):
        record[key] = side.text if side.path is None else [str(side.path), *stamp(side.path)]
    return Item(pair.id, None, name, record)


def stamp(path: Path) -> list[int]:
    """Size and time of a file; nothing if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def sides(judge: Judge, pair: Pair) -> tuple[Any, Any]:
    """Both sides, ready to be scored. InputError."""
    return judge.batch(pair.good), judge.batch(pair.bad)


def shown_sides(run: Evaluation, pair: Pair) -> dict[str, Any]:
    """What a row says of a pair: texts, or paths of recordings."""
    row: dict[str, Any] = {"group": pair.group} if pair.group else {}
    sides: dict[str, Side] = {"good": pair.good, "bad": pair.bad}
    for name, side in sides.items():
        row[name] = side.text if side.path is None else run.relative(side.path)
    return row
