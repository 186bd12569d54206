"""Speak the dev and test sets: make_tests.py OUT --set test|dev

Voices that nothing is trained on, speed 1, texts from a seed of their own: utterances of the world,
questions that go round all wordings of the dialogues, and open sentences that no corpus holds (see
sentences.py). OUT/manifest.jsonl is as in make_corpus.py; OUT/tts_texts.jsonl and
OUT/tts_open.jsonl hold texts to be spoken by the trained model. A second call goes on from where
the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from engines import DEV_VOICES, TEST_VOICES, Kokoro
from make_corpus import write_clip
from sentences import open_sentence
from world import load_dialogues, utterance

SETS = {"test": (TEST_VOICES, "test-1"), "dev": (DEV_VOICES, "dev-1")}
UTTERANCES, QUESTIONS, OPEN, TTS_TEXTS = 40, 60, 40, 40


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
    manifest = args.out / "manifest.jsonl"
    done = {json.loads(line)["id"] for line in manifest.open()} if manifest.exists() else set()
    count, free = 0, random.Random(f"{seed}-open")
    with manifest.open("a") as out:
        for voice in sorted(voices):
            asked = [questions[(count + i) % len(questions)] for i in range(QUESTIONS)]
            count += QUESTIONS
            spoken_texts: list[tuple[str, str, int | None]] = [
                *(("world", utterance(rng), None) for _ in range(UTTERANCES)),
                *(("question", text, qa) for text, qa in asked),
                *(("open", open_sentence(free, args.set), None) for _ in range(OPEN)),
            ]
            for number, (kind, text, qa) in enumerate(spoken_texts):
                row = {"id": f"{voice}-{number:03d}", "kind": kind, "text": text}
                if qa is not None:
                    row["qa"] = qa
                if row["id"] in done:
                    continue
                spoken = engine.say(text, {voice: 1.0}, 1.0)
                if not spoken and kind == "open":
                    continue  # a word that the synthesiser reads in another way
                assert spoken, text
                out.write(json.dumps(write_clip(args.out, row, spoken)) + "\n")
                out.flush()
    answers = rng.sample([pair["answer"] for pair in pairs], TTS_TEXTS * 2 // 5)
    world_texts = [utterance(rng) for _ in range(TTS_TEXTS - len(answers))] + answers
    free_texts = [open_sentence(free, args.set) for _ in range(TTS_TEXTS)]
    for name, mark, texts in (("texts", "tts", world_texts), ("open", "open", free_texts)):
        with (args.out / f"tts_{name}.jsonl").open("w") as rows:
            for number, text in enumerate(texts):
                rows.write(json.dumps({"id": f"{mark}-{number:02d}", "text": text}) + "\n")


if __name__ == "__main__":
    main()
