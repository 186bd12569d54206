"""The small world of the built-in model: its words, and seeded random utterances made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from sentences import open_sentence

DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBERS = DIGITS + TEENS + TENS + [f"{ten}-{digit}" for ten in TENS for digit in DIGITS[1:]]
LETTERS = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november "
    "oscar papa quebec romeo sierra tango uniform victor whiskey x-ray yankee zulu"
).split()
COMMANDS = [
    "yes", "no", "stop", "go", "left", "right", "up", "down", "on", "off", "start", "next",
    "back", "play", "pause", "cancel", "help", "open", "close", "forward", "louder", "quieter",
    "go back", "go forward", "turn left", "turn right", "turn it up", "turn it down",
    "turn on the light", "turn off the light", "open the door", "close the door",
    "play some music", "stop the music", "start the timer", "stop the timer", "send a message",
    "call home", "help me", "please wait", "say it again",
]  # fmt: skip
GREETINGS = [
    "hello", "hi", "good morning", "good night", "goodbye", "thank you", "thanks", "please",
    "sorry", "okay", "welcome", "see you later",
]  # fmt: skip
COLOURS = "red green blue yellow orange purple pink brown black white grey".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()

# name -> (items, share of the utterances, separator, most items in one utterance)
TOPICS = {
    "digits": (DIGITS, 24, " ", 6),
    "numbers": (NUMBERS, 20, ", ", 4),
    "letters": (LETTERS, 16, ", ", 6),
    "commands": (COMMANDS, 16, ", ", 3),
    "greetings": (GREETINGS, 4, ", ", 2),
    "colours": (COLOURS, 6, ", ", 4),
    "days": (DAYS, 5, ", ", 4),
    "months": (MONTHS, 5, ", ", 4),
    "mixed": (None, 4, ", ", 5),
}
MIXED = [items for items, *_ in TOPICS.values() if items is not None]


def load_dialogues(path: Path | None = None) -> list[dict]:
    """The fixed pairs: [{"questions": [str, ...], "answer": str}, ...]."""
    return json.loads((path or Path(__file__).with_name("dialogues.json")).read_text())


def utterance(rng: random.Random) -> str:
    """One random utterance: one to six items of one topic, or of several."""
    names = list(TOPICS)
    topic = rng.choices(names, [TOPICS[name][1] for name in names])[0]
    items, _, separator, most = TOPICS[topic]
    count = min(rng.choices(range(1, 7), [30, 18, 20, 14, 10, 8])[0], most)
    if items is None:
        words = [rng.choice(rng.choice(MIXED)) for _ in range(max(2, count))]
    else:
        words = [rng.choice(items) for _ in range(count)]
    text = separator.join(words)
    return text[0].upper() + text[1:] + "."


def sentence(rng: random.Random, kind: str, turn: int, order_seed: str) -> tuple[str, int | None]:
    """Text number `turn` of a kind, and its row in the dialogues when it has one.

    Questions and answers go round all pairs before one comes again. A few world utterances are
    answers (other people say such sentences too), a few of our own voice are questions.
    """
    if kind.endswith("open"):
        return open_sentence(rng), None
    pairs = load_dialogues()
    if kind in ("question", "moshi-answer"):
        order = list(range(len(pairs)))
        random.Random(f"{order_seed}-{kind}-{turn // len(pairs)}").shuffle(order)
        row = order[turn % len(pairs)]
        if kind == "question":
            return rng.choice(pairs[row]["questions"]), row
        return pairs[row]["answer"], row
    if rng.random() < 0.07:
        pair = rng.choice(pairs)
        return (pair["answer"] if kind == "world" else rng.choice(pair["questions"])), None
    return utterance(rng), None
