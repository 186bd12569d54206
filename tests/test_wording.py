"""Written text -> spoken words, whole and as a stream."""

from __future__ import annotations

import pytest

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks.wording import Item, Reader, Rest, Say, cardinal, ordinal, plain, read, spoken


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hello", "hello"),
        ("0", "zero"),
        ("42", "forty-two"),
        ("101.", "one hundred one."),
        ("1,234,567", "one million two hundred thirty-four thousand five hundred sixty-seven"),
        ("3.14,", "three point one four,"),
        ("007", "zero zero seven"),
        ("-5", "minus five"),
        ("4+1=5", "four plus one equals five"),
        ("50%", "fifty percent"),
        ("$3.50", "three dollars fifty"),
        ("£1", "one pound"),
        ("10:30", "ten thirty"),
        ("9:05", "nine oh five"),
        ("7:00", "seven o'clock"),
        ("22nd", "twenty-second"),
        ("30th", "thirtieth"),
        ("B2", "B two"),
        ("(12)", "(twelve)"),
        ("x-ray", "x-ray"),
        ("1234567890123456", " ".join(
            "one two three four five six seven eight nine zero one two three four five six".split()
        )),
    ],
)  # fmt: skip
def test_spoken(token: str, words: str) -> None:
    assert " ".join(spoken(token)) == words


def test_every_number_below_a_thousand_is_words() -> None:
    said = {tuple(cardinal(n)) for n in range(1000)}
    assert len(said) == 1000
    assert all(word.replace("-", "").isalpha() for words in said for word in words)
    assert (
        ordinal(3) == ["third"] and ordinal(12) == ["twelfth"] and ordinal(21) == ["twenty-first"]
    )


@pytest.mark.parametrize(
    ("word", "parts"),
    [("Twenty-one,", "twenty one"), ("I’m", "i'm"), ("'ello'", "ello"), ("—", ""), ("A_B", "a b")],
)
def test_plain(word: str, parts: str) -> None:
    assert " ".join(plain(word)) == parts


def test_hyphens_may_stay() -> None:
    assert plain("X-Ray,", hyphens=True) == ["x-ray"] and plain("- a -", hyphens=True) == ["a"]


def test_pauses_are_read() -> None:
    marked = 'one [pause:500ms] two<break time="1.5s"/>three [PAUSE: 2s]'
    assert read(marked) == [
        Say("one"), Rest(0.5), Say("two"), Rest(1.5), Say("three"), Rest(2.0),
    ]  # fmt: skip


@pytest.mark.parametrize("mark", ["[pause:1.2.3s]", "[pause:100s]", '<break time="."/>'])
def test_pauses_that_make_no_sense(mark: str) -> None:
    if mark == '<break time="."/>':
        assert Rest not in map(type, read(mark))  # no unit: not a pause
    else:
        with pytest.raises(UsageError):
            read(mark)


def test_sentences_rest() -> None:
    reader = Reader(sentence_silence_s=0.3)
    assert read("Go on. Stop\n\n\nNow", reader) == [
        Say("Go"), Say("on."), Rest(0.3), Say("Stop"), Rest(0.3), Say("Now"),
    ]  # fmt: skip


def test_dialogues_change_the_speaker() -> None:
    text = "A: Yes: no.\nB: Maybe."
    assert read(text, Reader(dialogue=True)) == [
        Say("Yes:"), Say("no."), Say("Maybe.", 1),
    ]  # fmt: skip
    assert read(text, Reader())[0] == Say("A:")


def test_plain_form() -> None:
    assert read("It is 21!", Reader(form="plain")) == [Say("it"), Say("is"), Say("twenty-one")]
    assert read("21", Reader(form="split")) == [Say("twenty"), Say("one")]


TEXT = (
    'A: Hello there. [pause:500ms] now<break time="1s"/>go [ok] <b>\n'
    'B: I am 42!\r\n\r\nBye <break time="200ms" /> 10:30 end'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_any_chunking_reads_the_same(size: int) -> None:
    def reader() -> Reader:
        return Reader(dialogue=True, sentence_silence_s=0.2)

    chunks = [TEXT[i : i + size] for i in range(0, len(TEXT), size)]
    assert read(chunks, reader()) == read(TEXT, reader())


def test_a_word_is_ready_when_white_space_follows() -> None:
    reader = Reader()
    came: list[list[Item]] = [reader.push(part) for part in ("hel", "lo", " wor", "ld")]
    assert came == [[], [], [Say("hello")], []]
    assert reader.flush() == [Say("world")]
