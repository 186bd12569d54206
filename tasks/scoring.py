"""From rows to figures: what each task's items say together.

A function per task: it takes the rows of the items that did not fail, writes what it counts into
them, and gives the figures. What rows must hold is said there. Scoring needs no model, so rows can
be scored again with another normaliser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moshi_cli.tasks.answers import verdict
from moshi_cli.tasks.evaluation import Figure, difference, kept, mean, ratio, total
from moshi_cli.tasks.metrics import letter_errors, word_errors
from moshi_cli.tasks.normalisers import OURS, Normaliser
from moshi_cli.tasks.word_times import COLLAR_S, Timed, compare, delays

Row = dict[str, Any]
Figures = dict[str, Figure]
CHIEF = ("wer", "exact", "written_exact", "heard_right", "both")  # figures told of groups


# Words --------------------------------------------------------------------------------------------


def counted(reference: str, hypothesis: str, normaliser: Normaliser = OURS) -> Row:
    """Word and letter errors of one transcript."""
    e = word_errors(reference, hypothesis, normaliser)
    c = letter_errors(reference, hypothesis, normaliser)
    return {
        "substitutions": e.substitutions, "deletions": e.deletions, "insertions": e.insertions,
        "hits": e.words - e.substitutions - e.deletions, "words": e.words, "wer": e.rate,
        "letter_errors": c.errors, "letters": c.words, "cer": c.rate,
    }  # fmt: skip


def rates(counts: Sequence[Mapping[str, Any]], prefix: str = "") -> Figures:
    """Figures of transcripts that `counted` has seen.

    wer and cer are those of the corpus; wer_mean and cer_mean the means of the items' own rates.
    words_in_silence: how much was written where nothing is said; empty_transcripts: the opposite.
    """
    if not counts:
        return {}
    spoken = [c for c in counts if c["words"]]
    silent = [c for c in counts if not c["words"]]
    errors = [_errors(c) for c in counts]
    found: dict[str, Figure | None] = {
        "wer": ratio(errors),
        "wer_mean": mean((c["wer"] for c in counts), "share"),
        "cer": ratio((c["letter_errors"], c["letters"]) for c in counts),
        "cer_mean": mean((c["cer"] for c in counts), "share"),
        "exact": mean((float(not e) for e, _ in errors), "share"),
        **{name: total(c[name] for c in counts)
           for name in ("substitutions", "deletions", "insertions", "hits")},
        "reference_words": total(words for _, words in errors),
        "empty_transcripts": total(c["deletions"] == c["words"] and not c["substitutions"]
                                   for c in spoken) if spoken else None,
        "words_in_silence": total(c["insertions"] for c in silent) if silent else None,
    }  # fmt: skip
    return {prefix + name: figure for name, figure in kept(found).items()}


def _errors(c: Mapping[str, Any]) -> tuple[int, int]:
    """Word errors, and words of the reference."""
    return c["substitutions"] + c["deletions"] + c["insertions"], c["words"]


def speed(rows: Sequence[Row]) -> Figures:
    """Seconds of work per second of sound, each item by itself; and how much sound there was."""
    timed = [r for r in rows if r.get("seconds") and r.get("audio_s")]
    return kept({
        "rtf": ratio(((r["seconds"], r["audio_s"]) for r in timed), ""),
        "audio": total((r["audio_s"] for r in timed), "s") if timed else None,
    })  # fmt: skip


def timed(words: Iterable[Sequence[Any]]) -> list[Timed]:
    """Words as JSON holds them."""
    return [(str(word), float(start), float(end)) for word, start, end, *_ in words]


def grouped(
    score: Callable[[Sequence[Row]], Figures], rows: Sequence[Row], by: str | None
) -> Figures:
    """Figures of all rows, and the chief ones of every kind or voice, as in wer/question."""
    found = score(rows)
    for value in sorted({str(row[by]) for row in rows if row.get(by)} if by else ()):
        part = score([row for row in rows if str(row.get(str(by))) == value])
        found |= {f"{name}/{value}": part[name] for name in CHIEF if name in part}
    return found


# Tasks --------------------------------------------------------------------------------------------


def asr(rows: Sequence[Row], normaliser: Normaliser = OURS, collar_s: float = COLLAR_S) -> Figures:
    """Rows with reference and hypothesis; with reference_words, hypothesis_words [[word, start,
    end], …] and emitted_s (seconds of sound heard when each was written) where times are known."""
    for row in rows:
        row |= counted(row["reference"], row["hypothesis"], normaliser)
        if not row.get("reference_words") or "hypothesis_words" not in row:
            continue
        true, found = timed(row["reference_words"]), timed(row["hypothesis_words"])
        t = compare(true, found, collar_s=collar_s, normaliser=normaliser)
        row |= {
            "times_found": t.found, "times_of": t.written + t.words, "overlap": t.overlap,
            "timed_words": t.words,
        }  # fmt: skip
        if "emitted_s" in row:
            late = delays(true, found, row["emitted_s"], normaliser)
            row |= {"delay_s": sum(late), "delays": len(late)}
    times = [r for r in rows if "times_found" in r]
    late_rows = [r for r in rows if r.get("delays")]
    return rates(rows) | speed(rows) | kept({
        "timestamp_f1": ratio(((2 * r["times_found"], r["times_of"]) for r in times), ""),
        "timestamp_miou": ratio(((r["overlap"], r["timed_words"]) for r in times), ""),
        "emission_delay": ratio(((r["delay_s"], r["delays"]) for r in late_rows), "s"),
        "first_word": mean((r.get("first_s") for r in rows), "s"),
    })  # fmt: skip


def tts(rows: Sequence[Row], normaliser: Normaliser = OURS) -> Figures:
    """Rows with reference (the text), audio_s, first_s, unspoken (words); with hypothesis where a
    judge has listened, reference_s where there is a recording of the text."""
    heard = [r for r in rows if r.get("hypothesis") is not None]
    for row in heard:
        row |= counted(row["reference"], row["hypothesis"], normaliser)
    asked = [(r["hits"] + r["substitutions"] + r["insertions"], r["words"]) for r in heard]
    real = [r for r in rows if r.get("reference_s")]
    return rates(heard) | kept({
        "length_ratio": ratio(asked, "") if heard else None,
        "duration_ratio": ratio(((r["audio_s"], r["reference_s"]) for r in real), ""),
        "unspoken_words": total(len(r.get("unspoken") or ()) for r in rows),
        "first_audio": mean((r.get("first_s") for r in rows), "s"),
    }) | speed(rows)  # fmt: skip


def answers_of(rows: Sequence[Row]) -> list[str]:
    """All answers to the questions of these rows, each once."""
    return list(dict.fromkeys(answer for row in rows for answer in row["answers"]))


ANSWERED = ("exact", "holds", "right")


def qa(
    rows: Sequence[Row], normaliser: Normaliser = OURS, answers: Sequence[str] | None = None
) -> Figures:
    """Rows with question, answers (good ones) and written; with heard_reply where a judge has
    listened, reply_s where there were words: from the end of the question, below 0 if too soon.

    answers: all of the set, if these are not all rows. both: written exactly, and heard rightly;
    what is asked of a spoken answer.
    """
    answers = answers_of(rows) if answers is None else answers
    for row in rows:
        for way, field in (("written", "written"), ("heard", "heard_reply")):
            if row.get(field) is not None:
                v = verdict(row[field], row["question"], row["answers"], answers, normaliser)
                row |= {f"{way}_{name}": getattr(v, name) for name in ANSWERED}
        if row.get("heard_reply") is not None:
            row["both"] = row["written_exact"] and row["heard_right"]
            each = [counted(answer, row["heard_reply"], normaliser) for answer in row["answers"]]
            row["heard_errors"] = min(each, key=lambda c: c["wer"])
    names = [f"{way}_{name}" for way in ("written", "heard") for name in ANSWERED]
    heard = [r["heard_errors"] for r in rows if "heard_errors" in r]
    return kept({
        **{n: mean((float(r[n]) for r in rows if n in r), "share") for n in [*names, "both"]},
        "silent_replies": mean((float(not r["written"].strip()) for r in rows), "share"),
        "reply_delay": mean((r.get("reply_s") for r in rows), "s"),
        "heard_wer": rates(heard).get("wer") if heard else None,
    }) | speed(rows)  # fmt: skip


def codec(
    rows: Sequence[Row], counts: Sequence[int], normaliser: Normaliser = OURS, semantic: int = 1
) -> Figures:
    """Rows with passes: {N: {measure: value, same: [frames per codebook], frames}} for N codebooks;
    with reference and heard: {"original": text, N: text} where a judge has listened; with later:
    {same, frames} where the recording was encoded from a little later on. semantic: codebooks.

    Figures of N codebooks end in @N if there are several N. wer_added is what the judge makes of
    the decoded sound, less what it makes of the original, per reference word.
    """
    judged = _judged(rows, normaliser)
    later = [r["later"] for r in rows if r.get("later")]
    found = _words([r["errors"]["original"] for r in judged], "original_")
    for n in counts:
        end = f"@{n}" if len(counts) > 1 else ""
        each = _distances(rows, str(n))
        each |= _same([r["passes"][str(n)] for r in rows], n, semantic, "idempotence")
        each |= kept({"stability": _same(later, n, semantic, "stability").get("stability")})
        each |= _added(judged, str(n))
        found |= {name + end: figure for name, figure in each.items()}
    stable = _same(later, max(counts), semantic, "stability")  # codes are the same for any n
    return found | {name: figure for name, figure in stable.items() if name != "stability"}


def compared(rows: Sequence[Row], name: str, normaliser: Normaliser = OURS) -> Figures:
    """Rows as in `codec` with a single pass of this name, of which no codes are known."""
    judged = _judged(rows, normaliser)
    found = _words([r["errors"]["original"] for r in judged], "original_")
    return found | _distances(rows, name) | _added(judged, name)


def _judged(rows: Sequence[Row], normaliser: Normaliser) -> list[Row]:
    """Rows that a judge has listened to; what it got wrong is counted in `errors`."""
    judged = [r for r in rows if r.get("heard") and r.get("reference") is not None]
    for row in judged:
        row["errors"] = {
            name: counted(row["reference"], text, normaliser) for name, text in row["heard"].items()
        }
    return judged


def _added(judged: Sequence[Row], name: str) -> Figures:
    """What a judge makes of a pass, and how much worse that is than of the original."""
    after, before = ([r["errors"][n] for r in judged] for n in (name, "original"))
    added = difference(map(_errors, after), map(_errors, before))
    return _words(after) | kept({"wer_added": added})


def _words(counts: Sequence[Row], prefix: str = "") -> Figures:
    """Of all `rates`, those that matter to a codec."""
    every = rates(counts, prefix)
    return {name: every[name] for name in (f"{prefix}wer", f"{prefix}cer") if name in every}


def _distances(rows: Sequence[Row], name: str) -> Figures:
    """What a pass is like beside the original."""
    from moshi_cli.tasks.fidelity import MEASURES

    passes = [row["passes"][name] for row in rows]
    return kept({
        name: mean((p.get(name) for p in passes), measure.unit)
        for name, measure in MEASURES.items() if any(name in p for p in passes)
    })  # fmt: skip


def _same(rows: Sequence[Row], count: int, semantic: int, name: str) -> Figures:
    """Share of codes that stay the same: of all, of the semantic codebooks, of each codebook."""

    def share(codebooks: Sequence[int]) -> Figure | None:
        sums = ((sum(r["same"][q] for q in codebooks), r["frames"]) for r in rows)
        return ratio((same, frames * len(codebooks)) for same, frames in sums)

    every, first = range(count), range(min(semantic, count))
    each = {f"{name}_q{q + 1}": share([q]) for q in every}
    return kept({name: share(every), f"{name}_semantic": share(first), **each})
