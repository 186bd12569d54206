"""Output formats, written out by hand."""

from __future__ import annotations

import json

import pytest

from moshi_cli.core.errors import UsageError
from moshi_cli.core.text import Word
from moshi_cli.tasks.events import Warning
from moshi_cli.tasks.subtitles import FORMATS, Layout, Segmenter, Transcript, render, segments

HELLO = (
    Word("Hello", 0.24, 0.64),
    Word("there.", 0.72, 1.72),
    Word("How", 3.04, 3.2),
    Word("are", 3.28, 3.44),
    Word("you?", 3.52, 4.0),
)
TALK = Transcript(HELLO, 4.5, {"model": "m", "seed": 1}, wall_s=0.5)


def test_segments_end_at_pauses_and_full_stops() -> None:
    assert [s.text for s in segments(HELLO)] == ["Hello there.", "How are you?"]
    slow = [Word("one", 0.0, 0.4), Word("two", 2.0, 2.4)]
    assert [s.text for s in segments(slow)] == ["one", "two"]


def test_segments_do_not_grow_without_end() -> None:
    many = [Word("word", i * 0.4, i * 0.4 + 0.3) for i in range(100)]
    assert all(s.end_s - s.start_s <= 10 and len(s.text) <= 84 for s in segments(many))
    assert sum(len(s.words) for s in segments(many)) == 100


def test_a_segment_comes_out_when_silence_ends_it() -> None:
    segmenter = Segmenter()
    assert segmenter.push(HELLO[0]) == [] and segmenter.wait(1.0) == []
    (segment,) = segmenter.wait(1.7)
    assert segment.text == "Hello" and segment.id == 0
    assert segmenter.wait(9.0) == []


def test_channels_are_kept_apart() -> None:
    two = [Word("yes", 0.0, 0.4, 0), Word("no", 0.1, 0.5, 1), Word("sir", 0.5, 0.9, 0)]
    assert [(s.id, s.channel, s.text) for s in segments(two)] == [(0, 0, "yes sir"), (1, 1, "no")]


def test_txt() -> None:
    assert render(TALK, "txt") == "Hello there.\nHow are you?\n"


def test_srt() -> None:
    assert render(TALK, "srt") == (
        "1\n00:00:00,240 --> 00:00:01,720\nHello there.\n\n"
        "2\n00:00:03,040 --> 00:00:04,000\nHow are you?\n\n"
    )


def test_vtt() -> None:
    assert render(TALK, "vtt") == (
        "WEBVTT\n\n00:00.240 --> 00:01.720\nHello there.\n\n"
        "00:03.040 --> 00:04.000\nHow are you?\n\n"
    )


def test_tsv() -> None:
    assert render(TALK, "tsv") == (
        "start\tend\ttext\n240\t1720\tHello there.\n3040\t4000\tHow are you?\n"
    )


def test_json() -> None:
    told = json.loads(render(TALK, "json"))
    assert told["text"] == "Hello there. How are you?"
    assert told["model"] == "m" and told["seed"] == 1 and told["audio_s"] == 4.5
    first = told["segments"][0]
    assert first["words"][1] == {"word": "there.", "start": 0.72, "end": 1.72}
    assert (first["id"], first["start"], first["end"]) == (0, 0.24, 1.72)
    assert "words" not in json.loads(render(TALK, "json", word_times=False))["segments"][0]


def test_jsonl() -> None:
    talk = Transcript(HELLO, 4.5, wall_s=0.5, extra=(Warning("stall", "no words", 2.0),))
    told = [json.loads(line) for line in render(talk, "jsonl").splitlines()]
    assert [e["type"] for e in told] == [
        "start", "word", "word", "segment", "warning", "word", "word", "word", "segment", "end",
    ]  # fmt: skip
    assert told[1] == {"type": "word", "text": "Hello", "start": 0.24, "end": 0.64, "channel": 0}
    assert told[3] == {
        "type": "segment", "id": 0, "start": 0.24, "end": 1.72, "text": "Hello there.",
        "channel": 0,
    }  # fmt: skip
    assert told[-1] == {"type": "end", "audio_s": 4.5, "wall_s": 0.5, "rtfx": 9.0}


def test_alignments() -> None:
    two = Transcript((HELLO[0], Word("yes", 1.0, 1.5, 1)), 2.0)
    assert json.loads(render(two, "alignments")) == {
        "alignments": [
            ["Hello", [0.24, 0.64], "SPEAKER_MAIN"], ["yes", [1.0, 1.5], "SPEAKER_OTHER"],
        ]
    }  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_silence_is_a_valid_file(format: str) -> None:
    text = render(Transcript((), 1.0), format)
    assert "None" not in text and (text.endswith("\n") or not text)


def shown(layout: Layout) -> list[str]:
    blocks = render(TALK, "srt", layout).strip().split("\n\n")
    return [block.split("\n", 2)[2] for block in blocks]


def test_lines_are_broken_as_asked() -> None:
    assert shown(Layout(line_width=7)) == ["Hello\nthere.", "How are\nyou?"]
    assert shown(Layout(line_width=7, line_count=1)) == ["Hello", "there.", "How are", "you?"]
    assert shown(Layout(words_per_line=2)) == ["Hello there.", "How are", "you?"]


def test_highlight_underlines_one_word_at_a_time() -> None:
    assert shown(Layout(highlight=True))[:3] == [
        "<u>Hello</u> there.", "Hello there.", "Hello <u>there.</u>",
    ]  # fmt: skip


def test_markup_in_words_is_harmless() -> None:
    odd = Transcript((Word("a-->b", 0.0, 0.5), Word("<i>&", 0.6, 1.0)), 1.0)
    assert "a->b <i>&" in render(odd, "srt")
    assert "a->b &lt;i>&amp;" in render(odd, "vtt")


def test_hours() -> None:
    late = Transcript((Word("late", 3725.5, 3726.0),), 4000.0)
    assert "01:02:05,500 --> 01:02:06,000" in render(late, "srt")
    assert "01:02:05.500 --> 01:02:06.000" in render(late, "vtt")


@pytest.mark.parametrize(
    "limits", [{"line_count": 2}, {"line_width": 5, "words_per_line": 2}, {"line_width": 0}]
)
def test_limits_that_make_no_sense(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Layout(**limits)  # type: ignore[arg-type]


def test_unknown_format() -> None:
    with pytest.raises(UsageError):
        render(TALK, "doc")
