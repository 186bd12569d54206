"""`moshi data tokenizer`, `ngrams` and `text`: what a language is learnt from without speech."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moshi_cli.core.errors import UsageError
from moshi_cli.options import Json, LogOptions, flag, spread

Texts = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT...", help=".txt (an empty line ends a document) or .jsonl, .gz, or folders.",
        show_default=False,
    ),
]  # fmt: skip
Key = Annotated[str, flag("--key", "Of the text (or timed words) in a line of .jsonl.")]


@spread
def tokenizer(
    inputs: Texts,
    *,
    output: Annotated[Path, flag("--output/-o", "File of the tokenizer.", metavar="FILE")],
    size: Annotated[int, flag("--size", "Pieces, of which 256 are bytes.", min=264)] = 32_000,
    chars: Annotated[int, flag("--chars", "Read at most so much text.", min=1)] = 50_000_000,
    key: Key = "text",
    fold_case: Annotated[bool, flag("--fold-case", "Capitals become small letters.")] = False,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Train a SentencePiece unigram tokenizer: single digits, bytes for what it does not know."""
    from moshi_cli.tasks.texts import documents, fit_tokenizer, text_files

    console = log.console("data tokenizer")
    texts = documents(text_files(inputs), key)
    made = fit_tokenizer(texts, size, output, chars=chars, fold_case=fold_case)
    if json:
        console.record({"tokenizer": str(output), "pieces": made.size})
    else:
        console.line(str(output))
        console.info(f"{made.size} pieces")


@spread
def ngrams(
    inputs: Texts,
    *,
    output: Annotated[Path, flag("--output/-o", "File of the n-grams.", metavar="FILE")],
    tokenizer: Annotated[
        str, flag("--tokenizer", "SentencePiece file, or a model whose tokenizer is used.")
    ],
    order: Annotated[int, flag("--order", "Tokens that are seen together.", min=1, max=9)] = 4,
    least: Annotated[
        str, flag("--least", "How often those of 2, 3, … tokens occur, to be kept.", metavar="N,N…")
    ] = "1,2,2",
    recurrent: Annotated[
        int,
        flag("--recurrent", "Passes over the text for a recurrent model beside them.", min=0),
    ] = 0,
    arpa: Annotated[
        Path | None,
        flag(
            "--arpa",
            "A language model of words in the ARPA format, or gzipped, to stand beside them.",
            metavar="FILE",
        ),
    ] = None,
    arpa_size: Annotated[
        int, flag("--arpa-size", "Pairs and triples of its words that are kept.", min=0)
    ] = 1_000_000,
    key: Key = "text",
    no_punctuation: Annotated[
        bool, flag("--no-punctuation", "Bare words, for a model that writes no punctuation.")
    ] = False,
    json: Json = False,
    log: LogOptions,
) -> None:
    """Count n-grams of text tokens, for the search of `moshi asr`; a sentence is a line.

    The words of the text are kept, too: the search finds others much less likely. A recurrent model
    remembers whole sentences; five million tokens take some eight minutes a pass. It counts in a
    model's own file, not in one that `--ngrams` puts beside it. A language model of words (--arpa)
    tells what follows what in far more text than is at hand; its words are to be spelled as the
    text is.
    """
    from moshi_cli.core.text import Text
    from moshi_cli.tasks.arpa import Spelled, read_arpa
    from moshi_cli.tasks.ngrams import bare, count, sentences, words_of
    from moshi_cli.tasks.recurrent import Learning, learn
    from moshi_cli.tasks.texts import documents, text_files

    console = log.console("data ngrams")
    try:
        minima = [int(number) for number in least.split(",") if number.strip()]
    except ValueError:
        raise UsageError(f"--least {least!r} is not numbers with commas") from None
    pieces = Text(tokenizer_file(tokenizer))
    lines = (line for text in documents(text_files(inputs), key) for line in text.splitlines())
    if no_punctuation:
        lines = (bare(line) for line in lines)
    rows = sentences(lines, pieces)
    made = count(rows, order, pieces.size, minima)
    spelled = None if arpa is None else Spelled(read_arpa(arpa), pieces)
    made.words = words_of([*rows, *(spelled.rows if spelled else ())], pieces)
    if spelled is not None:
        made.wordgrams = spelled.tables(arpa_size)
    if recurrent:
        made.recurrent = learn(
            rows, pieces.size, Learning(recurrent),
            tell=lambda done, nats: console.info(f"pass {done}: {nats:.3f} nats a token"),
        )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    made.save(output)
    if json:
        console.record({"ngrams": str(output), "entries": len(made.grams.keys)})
    else:
        console.line(str(output))
        console.info(f"{len(made.grams.keys)} n-grams, {len(made.histories.keys)} histories")


@spread
def text(
    inputs: Texts,
    *,
    output_dir: Annotated[Path, flag("--output-dir/-o", "Folder of the pack.", metavar="DIR")],
    tokenizer: Annotated[
        str, flag("--tokenizer", "SentencePiece file, or a model whose tokenizer is used.")
    ],
    filters: Annotated[
        list[str] | None,
        flag(
            "--filter", "NAME[:KEY=VALUE,…] in order: duplicates, language, quality, or "
            "package.module:Class. Default: all three.", metavar="STEP",
        ),
    ] = None,
    no_filter: Annotated[bool, flag("--no-filter", "Keep every document.")] = False,
    key: Key = "text",
    json: Json = False,
    log: LogOptions,
) -> None:  # fmt: skip
    """Filter, tokenise and pack documents for `moshi train text`."""
    from dataclasses import asdict

    from moshi_cli.core.text import Text
    from moshi_cli.tasks.filters import Filters, make_step
    from moshi_cli.tasks.texts import documents, text_files, write_pack

    console = log.console("data text")
    pieces = Text(tokenizer_file(tokenizer))
    if no_filter and filters:
        raise UsageError("--no-filter and --filter contradict each other")
    wanted = [] if no_filter else filters or ["duplicates", "language", "quality"]
    named = {step: parsed(step) for step in wanted}
    steps = {step: make_step(name, **settings) for step, (name, settings) in named.items()}
    found = documents(text_files(inputs), key)
    packed = write_pack(found, pieces, output_dir, Filters(steps))
    if json:
        console.record({"pack": str(output_dir), **asdict(packed)})
        return
    console.line(str(output_dir))
    dropped = ", ".join(f"{count} by {step}" for step, count in packed.dropped.items() if count)
    told = f"; dropped: {dropped}" if dropped else ""
    console.info(f"{packed.documents} documents, {packed.tokens} tokens{told}")


def tokenizer_file(name: str) -> Path:
    """A file of pieces, or that of the model of this name."""
    from moshi_cli.core.hub import Source
    from moshi_cli.core.weights import read_config
    from moshi_cli.session import BUILTIN, BUILTIN_NAME

    if Path(name).is_file():
        return Path(name)
    source = Source.of(BUILTIN if name == BUILTIN_NAME else name)
    return source.file(read_config(source).text_file)


def parsed(step: str, option: str = "--filter") -> tuple[str, dict[str, Any]]:
    """NAME[:KEY=VALUE,…] -> name and settings; a class's own colon stays with the name."""
    head, equals, rest = step.partition("=")
    name, colon, key = head.rpartition(":")
    if not equals:
        return step, {}
    if not colon:
        raise UsageError(f"{option} {step}: settings follow the name: NAME:KEY=VALUE,…")
    settings: dict[str, Any] = {}
    for part in f"{key}={rest}".split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"{option} {step}: {part!r} is not of the form KEY=VALUE")
        settings[key] = as_value(value)
    return name, settings


def as_value(text: str) -> Any:
    """A number if it is one; words with + between them are a list."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.split("+") if "+" in text else text
