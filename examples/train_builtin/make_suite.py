"""Write the test set of the recipe as a suite of `moshi eval suite`:

    python make_suite.py OUT --test CORPUS/test --digits DIGITS --prompts PROMPTS \\
        --lags 0 0.32 0.64 1.28 2.48
    moshi eval suite OUT/suite.yaml -o FIGURES --batch-size 8 --html FIGURES/report.html \\
        --judge "command:TEACHERS/venv/bin/python judge.py TEACHERS/whisper-base"

asr: word errors on voices never trained on, in the small world and in open sentences; of a real
person's prompts; and words written in silence. lag-*: the same weights with other lags. digits: a
real speaker, digit by digit and in strings. tts: what the judge hears in spoken texts of the world,
and in open ones. codec: what it hears after 8 codebooks, more than before. chat: questions of
unseen voices, the answers read and heard, answers that somebody speaks into, and silence. speed: a
minute of sound, or ten texts, one at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from recordings import (
    Clip,
    digit_clips,
    digit_strings,
    load_test,
    long_recording,
    prompt_clips,
    rows,
    silences,
    spread,
)
from world import load_dialogues

CODEC_CLIPS = 160  # the codec is judged on so many of the test clips
LAG_CLIPS = 240  # one set of weights hears so many with each lag
SPEED_TEXTS = 10
INTERRUPTED = 120  # questions whose answers are interrupted, about
QUIET = {"text": "", "answer": ""}  # what is said in silence, and the right answer to it
Row = dict[str, Any]


def heard(clips: Iterable[Clip], **more: Any) -> list[Row]:
    """Rows of a manifest."""
    keys = ("id", "text", "voice", "kind")
    return [
        {**{k: getattr(c, k) for k in keys}, "path": str(c.path.resolve()), **more} for c in clips
    ]


def entries(
    test: Path,
    digits: Path | None,
    prompts: Path | None,
    out: Path,
    limit: int | None,
    lags: Sequence[float] = (),
) -> Iterator[tuple[Row, Sequence[Row]]]:
    """All that is measured, in the order of the table: an entry, and the rows of its manifest."""
    every = load_test(test)
    world, pairs = [c for c in every if c.kind != "open"], load_dialogues()
    free = [c for c in every if c.kind == "open"]
    quiet = heard(silences(out / "silence"), **QUIET)
    long = Clip("long", out / "long.wav", "", "all", "long")
    long_recording(world, long.path)
    minute = heard([long], **QUIET)
    texts, free_texts = (
        spread(rows(test / f"tts_{name}.jsonl"), limit) for name in ("texts", "open")
    )

    yield {
        "name": "asr", "task": "asr", "options": {"by": "kind"},
        "goals": {"wer": "≤ 5 %"}, "figures": ["wer/world", "wer/question"],
    }, heard(spread(world, limit))  # fmt: skip
    yield {
        "name": "asr-open", "task": "asr", "options": {"by": "voice"}, "goals": {"wer": "≤ 15 %"},
    }, heard(spread(free, limit))  # fmt: skip
    if prompts is not None:
        real = prompt_clips(prompts, out / "prompt")
        goals = {"goals": {"wer": "≤ 35 %"}}
        yield {"name": "asr-real", "task": "asr", **goals}, heard(spread(real, limit))
    yield {"name": "asr-silence", "task": "asr", "goals": {"words_in_silence": "0"}}, quiet
    timed = [
        {**row, "words": clip.words}
        for clip in spread([*world, *free], min(LAG_CLIPS, limit or LAG_CLIPS))
        for row in heard([clip])
    ]
    for lag in lags:
        yield {
            "name": f"lag-{lag:g}", "task": "asr",
            "options": {"delay": lag, "by": "kind", "beam_size": 1},
            "figures": ["wer", "wer/open", "wer/world", "emission_delay"],
        }, timed  # fmt: skip
    if digits is not None:
        single = digit_clips(digits, out / "digit")
        for name, found in (
            ("digits-single", single),
            ("digits-strings", digit_strings(single, out / "string")),
        ):
            goals = {"goals": {"wer": "≤ 20 %"}, "figures": ["exact"]}
            yield {"name": name, "task": "asr", **goals}, heard(spread(found, limit))
    for name, some in (("tts", texts), ("tts-open", free_texts)):
        yield {
            "name": name, "task": "tts", "goals": {"wer": "≤ 12 %", "unspoken_words": "0"},
        }, some  # fmt: skip
    yield {
        "name": "codec", "task": "codec", "options": {"num-codebooks": 8},
        "goals": {"wer_added": "≤ 5 points", "stoi": "≥ 0.82"},
        "figures": ["original_wer", "mel_db", "bitrate"],
    }, heard(spread(every, min(CODEC_CLIPS, limit or CODEC_CLIPS)))  # fmt: skip
    questions = [
        row | {"answer": pairs[int(str(clip.qa))]["answer"]}
        for clip in spread([c for c in every if c.kind == "question"], limit)
        for row in heard([clip])
    ]
    yield {
        "name": "chat", "task": "qa", "options": {"by": "voice"},
        "goals": dict.fromkeys(("written_exact", "heard_right", "both"), "≥ 85 %"),
        "figures": ["written_holds", "heard_exact", "heard_wer"],
    }, questions  # fmt: skip
    yield {
        "name": "interrupt", "task": "interrupt", "goals": {"stopped": "≥ 70 %"},
        "figures": ["stop_delay", "goes_on_alone", "answered", "interruptible"],
    }, questions[:: max(1, len(questions) // INTERRUPTED)]  # fmt: skip
    yield {
        "name": "chat-silence", "task": "qa", "options": {"judge": "none"},
        "goals": {"silent_replies": "100 %"},
    }, quiet  # fmt: skip
    goal, alone = {"goals": {"rtf": "< 0.6"}}, {"batch-size": 1}
    unheard = {"options": {**alone, "judge": "none"}, **goal}
    few, shown = texts[:SPEED_TEXTS], {"figures": ["first_audio"]}
    yield {"name": "speed-asr", "task": "asr", "options": alone, **goal}, minute
    yield {"name": "speed-tts", "task": "tts", **unheard, **shown}, few
    yield {"name": "speed-chat", "task": "qa", **unheard}, minute


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--test", type=Path, required=True, help="folder of make_tests.py")
    parser.add_argument("--digits", type=Path, help="folder of free-spoken-digit-dataset")
    parser.add_argument("--prompts", type=Path, help="folder of a person's prompts")
    parser.add_argument("--lags", type=float, nargs="*", default=[], help="seconds, for delays.py")
    parser.add_argument("--limit", type=int, help="at most so many recordings, from everywhere")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    listed = []
    for entry, some in entries(
        args.test.resolve(), args.digits, args.prompts, args.out, args.limit, args.lags
    ):
        manifest = args.out / f"{entry['name']}.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in some))
        listed.append({**entry, "manifest": manifest.name})
    suite = {"title": "The test set of the built-in model", "entries": listed}
    text = yaml.dump(suite, Dumper=Plain, sort_keys=False, allow_unicode=True)
    (args.out / "suite.yaml").write_text(text, encoding="utf-8")


class Plain(yaml.SafeDumper):
    """YAML without references to what was said before."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


if __name__ == "__main__":
    main()
