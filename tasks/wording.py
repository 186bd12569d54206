"""Written text -> words as they are spoken, with pauses and speakers, from whole texts or streams.

What a text may hold beside words: `[pause:500ms]` or `<break time="0.5s"/>`, a blank line (new
sentence) and, in dialogues, `A:` or `B:` at the start of a line. Numbers become words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moshi_cli.core.errors import UsageError

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GROUPS = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth",
    "nine": "ninth", "twelve": "twelfth",
}  # fmt: skip
SYMBOLS = {
    "&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "#": "number",
    "×": "times", "*": "times", "÷": "divided by", "°": "degrees",
}  # fmt: skip
MONEY = {"$": "dollar", "€": "euro", "£": "pound"}
LONGEST_NUMBER = 12  # digits; longer ones are spelled, as are those that begin with 0
LONGEST_PAUSE_S = 60.0


# Numbers ------------------------------------------------------------------------------------------


def cardinal(number: int) -> list[str]:
    """142 -> ["one", "hundred", "forty-two"]; below 10 ** 12."""
    if number < 20:
        return [UNITS[number]]
    if number < 100:
        rest = number % 10
        return [TENS[number // 10 - 2] + (f"-{UNITS[rest]}" if rest else "")]
    size, name = next((size, name) for size, name in GROUPS if number >= size)
    rest = number % size
    return [*cardinal(number // size), name, *(cardinal(rest) if rest else [])]


def ordinal(number: int) -> list[str]:
    """42 -> ["forty-second"]."""
    *head, last = cardinal(number)
    tens, hyphen, unit = last.rpartition("-")
    unit = ORDINALS.get(unit) or (f"{unit[:-1]}ieth" if unit.endswith("y") else f"{unit}th")
    return [*head, tens + hyphen + unit]


def digits(text: str) -> list[str]:
    """ "007" -> ["zero", "zero", "seven"]."""
    return [UNITS[int(digit)] for digit in text]


def _integer(text: str) -> list[str]:
    text = text.replace(",", "")
    spelled = len(text) > LONGEST_NUMBER or (len(text) > 1 and text.startswith("0"))
    return digits(text) if spelled else cardinal(int(text))


_WHOLE = r"\d{1,3}(?:,\d{3})+|\d+"
_NUMBER = re.compile(
    rf"(?P<money>[$€£])?(?P<whole>{_WHOLE})(?:\.(?P<part>\d+))?(?P<kind>st|nd|rd|th)?(?![^\W\d_])"
)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?!\d)")


def _spell(match: re.Match[str]) -> str:
    whole, part, money = match["whole"], match["part"], match["money"]
    if money:
        words = [*_integer(whole), MONEY[money] + ("" if whole == "1" else "s")]
        words += cardinal(int(part)) if part and len(part) == 2 and int(part) else []
    elif match["kind"] and not part:
        words = ordinal(int(whole.replace(",", "")))
    else:
        words = [*_integer(whole), *(["point", *digits(part)] if part else [])]
    return f" {' '.join(words)} "


def _spell_clock(match: re.Match[str]) -> str:
    minute = match[2]
    words = [*cardinal(int(match[1]))]
    if minute == "00":
        words.append("o'clock")
    else:
        words += ["oh", *cardinal(int(minute))] if minute[0] == "0" else cardinal(int(minute))
    return f" {' '.join(words)} "


def spoken(token: str) -> list[str]:
    """The words of a piece of text without white space: "42%" -> ["forty-two", "percent"]."""
    if not any(c.isdigit() or c in SYMBOLS for c in token):
        return [token]
    text = _CLOCK.sub(_spell_clock, token)
    text = re.sub(r"^[-−](?=[$€£]?\d)", "minus ", text)
    text = _NUMBER.sub(_spell, text)
    text = re.sub(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])", " ", text)  # B2 -> B 2
    text = re.sub(r"\d+", lambda m: f" {' '.join(_integer(m[0]))} ", text)
    for symbol, word in SYMBOLS.items():
        text = text.replace(symbol, f" {word} ")
    words = [word.strip("-–—/") if len(word) > 1 else word for word in text.split()]
    return _joined([word for word in words if word])


def _joined(words: list[str]) -> list[str]:
    """Punctuation that lost its number goes to the word before, an opening one to the next."""
    out: list[str] = []
    for word in words:
        if out and not any(map(str.isalnum, word)):
            out[-1] += word
        elif out and not any(map(str.isalnum, out[-1])):
            out[-1] += word
        else:
            out.append(word)
    return out


def plain(word: str, *, hyphens: bool = False) -> list[str]:
    """Lower case, letters and apostrophes only: "Twenty-one," -> ["twenty", "one"].

    hyphens: those inside words are kept: ["twenty-one"].
    """
    word = word.lower().replace("’", "'").replace("_", " ")
    parts = re.sub(r"[^\w'-]+" if hyphens else r"[^\w']+", " ", word).split()
    return [part for part in (p.strip("'-") for p in parts) if part]


# Scripts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Say:
    """A word, as it is shown."""

    word: str
    speaker: int = 0
    ends: bool = field(default=False, compare=False)  # a sentence


@dataclass(frozen=True)
class Rest:
    """Silence."""

    seconds: float


Item = Say | Rest

_MARK = re.compile(
    r"<break\s+time\s*=\s*[\"']?\s*(?P<break>[\d.]+)\s*(?P<bunit>ms|s)\s*[\"']?\s*/?>"
    r"|\[pause:\s*(?P<pause>[\d.]+)\s*(?P<punit>ms|s)\s*\]"
    r"|(?P<blank>\n[^\S\n]*\n\s*)"
    r"|(?P<turn>(?:(?<=\n)|^)[^\S\n]*[A-E]:(?=\s|$))"
    r"|(?P<space>\s+)"
    r"|(?P<word>(?:(?!<break\s|\[pause:)\S)+|\S)",
    re.IGNORECASE,
)
_OPEN = re.compile(r"(<b?r?e?a?k?$|<break\s[^>]*$|\[p?a?u?s?e?:?$|\[pause:[^\]]*$)", re.IGNORECASE)


class Reader:
    """Text as it arrives -> words and rests; a word is ready when white space follows it.

    dialogue: lines that begin with `A:` … `E:` change the speaker. sentence_silence_s: rest after
    a word that ends in . ? or !, and at blank lines. form: "written" (as typed), "plain" (lower
    case, no punctuation) or "split" (plain, and hyphenated words are several).
    """

    def __init__(
        self, *, form: str = "written", dialogue: bool = False, sentence_silence_s: float = 0.0
    ) -> None:
        assert form in ("written", "plain", "split"), form
        self.form, self.dialogue, self.sentence_silence_s = form, dialogue, sentence_silence_s
        self.held = "\n"  # a text begins like a line
        self.speaker = 0
        self.spoke = False  # since the last rest between sentences

    def push(self, text: str) -> list[Item]:
        """More text; the items that are complete."""
        self.held += text.replace("\r\n", "\n")
        unfinished = _OPEN.search(self.held)
        cut, end = 0, unfinished.start() if unfinished else len(self.held)
        for match in _MARK.finditer(self.held, 0, end):
            if match.lastgroup in ("space", "blank"):
                cut = match.start()  # white space stays with what follows it
            elif match.lastgroup in ("bunit", "punit"):
                cut = match.end()
        ready, self.held = self.held[:cut], self.held[cut:]
        return list(self._items(ready))

    def flush(self) -> list[Item]:
        """The text is over; what is left."""
        ready, self.held = self.held, "\n"
        return list(self._items(ready))

    def _items(self, text: str) -> Iterator[Item]:
        for match in _MARK.finditer(text):
            kind = match.lastgroup
            if kind in ("bunit", "punit"):
                amount, unit = (
                    (match["break"] or match["pause"]),
                    (match["bunit"] or match["punit"]),
                )
                yield rest(amount, unit)
            elif kind == "blank":
                yield from self._sentence_end()
            elif kind == "turn" and self.dialogue:
                self.speaker = "abcde".index(match[0].strip()[0].lower())
            elif kind in ("word", "turn"):
                yield from self._words(match[0].strip())

    def _words(self, token: str) -> Iterator[Item]:
        ends = token.rstrip("\"')]”’").endswith((".", "?", "!"))
        hyphens = self.form == "plain"
        parts = [
            part
            for word in spoken(token)
            for part in ([word] if self.form == "written" else plain(word, hyphens=hyphens))
        ]
        for i, part in enumerate(parts, 1):
            self.spoke = True
            yield Say(part, self.speaker, ends and i == len(parts))
        if ends:
            yield from self._sentence_end()

    def _sentence_end(self) -> Iterator[Item]:
        if self.spoke and self.sentence_silence_s:
            yield Rest(self.sentence_silence_s)
        self.spoke = False


def rest(amount: str, unit: str) -> Rest:
    """ "500", "ms" -> Rest(0.5); UsageError beyond a minute."""
    try:
        seconds = float(amount) / (1000 if unit.lower() == "ms" else 1)
    except ValueError:
        raise UsageError(f"a pause of {amount!r} {unit} is no number") from None
    if seconds > LONGEST_PAUSE_S:
        raise UsageError(f"a pause of {seconds:g} s is longer than {LONGEST_PAUSE_S:g} s")
    return Rest(seconds)


def read(text: str | Iterable[str], reader: Reader | None = None) -> list[Item]:
    """A whole text at once."""
    reader = reader or Reader()
    parts = [text] if isinstance(text, str) else text
    return [item for part in parts for item in reader.push(part)] + reader.flush()
