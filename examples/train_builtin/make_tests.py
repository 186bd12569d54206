"""Speak the dev and test sets: make_tests.py OUT --set test|dev

Voices that nothing is trained on, speed 1, texts from a seed of their own; the questions go round
all wordings of the dialogues. OUT/manifest.jsonl is as in make_corpus.py; OUT/tts_texts.jsonl
holds texts to be spoken by the trained model.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from engines import DEV_VOICES, TEST_VOICES, Kokoro
from make_corpus import write_clip
from world import load_dialogues, utterance

SETS = {"test": (TEST_VOICES, "test-1"), "dev": (DEV_VOICES, "dev-1")}
UTTERANCES, QUESTIONS, TTS_TEXTS = 40, 60, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=SETS, required=True)
    args = parser.parse_args()
    voices, seed = SETS[args.set]
    rng, engine, pairs = random.Random(seed), Kokoro(), load_dialogues()
    questions = [(text, qa) for qa, pair in enumerate(pairs) for text in pair["questions"]]
    rng.shuffle(questions)
    args.out.mkdir(parents=True, exist_ok=True)
    count = 0
    with (args.out / "manifest.jsonl").open("w") as manifest:
        for voice in sorted(voices):
            asked = [questions[(count + i) % len(questions)] for i in range(QUESTIONS)]
            count += QUESTIONS
            texts: list[tuple[str, int | None]] = [
                (utterance(rng), None) for _ in range(UTTERANCES)
            ]
            for number, (text, qa) in enumerate([*texts, *asked]):
                kind = "world" if qa is None else "question"
                row = {"id": f"{voice}-{number:03d}", "kind": kind, "text": text}
                if qa is not None:
                    row["qa"] = qa
                spoken = engine.say(text, {voice: 1.0}, 1.0)
                assert spoken, text
                manifest.write(json.dumps(write_clip(args.out, row, spoken)) + "\n")
                manifest.flush()
    answers = rng.sample([pair["answer"] for pair in pairs], TTS_TEXTS * 2 // 5)
    texts_only = [utterance(rng) for _ in range(TTS_TEXTS - len(answers))] + answers
    with (args.out / "tts_texts.jsonl").open("w") as out:
        for number, text in enumerate(texts_only):
            out.write(json.dumps({"id": f"tts-{number:02d}", "text": text}) + "\n")


if __name__ == "__main__":
    main()
