"""What a model says, and how well it is understood: rehearse.py MODEL WHISPER CACHE PACK ...

The model speaks texts of the packs by itself, each several times, as text to speech; or it answers
their questions (--chat), and those takes count whose words are one of the answers in the packs.
WHISPER (a folder for faster-whisper) hears every take in a window as long as the take, and tells
how likely each word is once those before it are known. CACHE becomes a cache of codes for `moshi
train` (see tasks/cache.py) in which a word is worth more than nothing where it was clearer than in
other takes of it, and less where it was not. Who goes on with these beside recordings hears itself
go on as it began, and learns of all that it may say what is understood (REINFORCE, with the mean of
a word's takes as its baseline).
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moshi_cli.core import load
from moshi_cli.core.engine import Engine
from moshi_cli.core.streams import Task
from moshi_cli.core.weights import Model
from moshi_cli.tasks.cache import FRAME_HZ, REST, Take, flattened, keep_facts
from moshi_cli.tasks.chat import CHAT, Talking, TalkingOptions
from moshi_cli.tasks.codec import describe
from moshi_cli.tasks.data import Pack
from moshi_cli.tasks.events import End, Event, Word
from moshi_cli.tasks.loop import Output, drive
from moshi_cli.tasks.manner import Manner
from moshi_cli.tasks.sound import FRAME_SAMPLES, Sound
from moshi_cli.tasks.takes import Take as Sentence
from moshi_cli.tasks.tts import read, speaking_engine
from moshi_cli.tasks.whisper import WhisperEncoder
from moshi_cli.tasks.wording import cardinal

RATE_HZ, MARGIN_S = 24_000, 0.3
OWN = "moshi"  # what the kinds of the own voice's clips begin with
WITHIN_S = 0.01  # that a word begins in its frame
WINDOWS_S = (3.0, 5.0, 8.0, 12.0, 20.0, 30.0)  # that takes are filled up to
BATCH = 8  # takes heard at a time
ANSWER_S = 5.0  # after a question
BEFORE, AFTER = 4, 14  # frames of an answer before its first word and after the last one's start
LONGEST = 160  # letters of a text
LEAST = 0.005  # likelihood of a token, of which less is no worse
OTHERWISE = {"-".join(cardinal(n)): str(n) for n in range(100)} | {
    "alfa": "Alpha", "juliett": "Juliet", "whiskey": "Whisky",
}  # fmt: skip

Row = dict[str, Any]


class Reading(Sentence):
    """A text in a slot, whose codes are kept and not decoded."""

    def __init__(self, model: Model, row: Row, number: int, seed: int):
        assert model.text is not None
        super().__init__(model, read(row["text"], model.text, Manner()), 0, seed=seed)
        self.row, self.number = row, number

    def said(self) -> Said | None:
        """The take; None if it is longer than Whisper hears."""
        words = self.row["text"].split()  # as a recogniser writes them, if as many are spoken
        if len(words) != len(self.spoken):
            words = [word.text for word in self.spoken]
        kind = self.row["kind"] if self.row["kind"].startswith(OWN) else f"{OWN}-{self.row['kind']}"
        return said(self, kind, words, 0, len(self.codes))


class Answering(Talking):
    """A question in a slot, the codes of whose answer are kept and not decoded."""

    def __init__(self, model: Model, task: Task, row: Row, number: int, seed: int):
        options = TalkingOptions(tail_s=ANSWER_S)
        super().__init__(model, task, Sound(row["sound"]), seed=seed, options=options)
        self.row, self.number = row, number
        self.codes: list[Tensor] = []
        self.spoken: list[Word] = []

    def take(self, output: Output) -> Iterable[Event]:
        """One frame of codes."""
        assert output.codes is not None
        yield from self.words.push(output.text)
        self.told.clear()
        self.codes.append(output.codes)
        self.given += FRAME_SAMPLES

    def said(self) -> Said | None:
        """The take, if it is one of the right answers and nothing else."""
        right = self.row["answers"].get(plain(word.text for word in self.spoken))
        if right is None:
            return None
        first, last = (int(self.spoken[i].start_s * FRAME_HZ) for i in (0, -1))
        return said(self, f"{OWN}-answer", right.split(), max(first - BEFORE, 0), last + AFTER)


@dataclass
class Said:
    """A take: a row of a cache as far as it is known, its codes long[Q, T], and its words as a
    recogniser writes them."""

    take: Take
    codes: Tensor
    words: list[str]


def said(of: Reading | Answering, kind: str, words: list[str], first: int, end: int) -> Said | None:
    """Frames `first` to `end` of what was made; None if its words are not those."""
    codes = torch.stack(of.codes[first:end], 1)
    if len(words) != len(of.spoken) or codes.shape[1] / FRAME_HZ + 2 * MARGIN_S > WINDOWS_S[-1]:
        return None
    shift = WITHIN_S - first / FRAME_HZ
    timed = tuple((w.text, w.start_s + shift, w.end_s + shift) for w in of.spoken)
    name, qa = f"{of.row['id']}/{of.number}", of.row["qa"] if kind == f"{OWN}-answer" else None
    take = Take(name, f"{kind}-self", "self", " ".join(words), timed, 0, codes.shape[1], qa)
    return Said(take, codes, words)


def plain(words: Iterable[str]) -> str:
    """Letters and figures only."""
    return re.sub(r"[^a-z0-9]", "", "".join(words).lower())


class Ear:
    """Whisper, on windows as long as what is heard."""

    def __init__(self, folder: Path):
        from faster_whisper import WhisperModel
        from faster_whisper.tokenizer import Tokenizer
        from faster_whisper.transcribe import get_ctranslate2_storage

        self.model = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)
        self.encoder = WhisperEncoder(folder, RATE_HZ)  # for its spectra of sound at that rate
        self.storage = get_ctranslate2_storage
        self.tokenizer = Tokenizer(
            self.model.hf_tokenizer, self.model.model.is_multilingual, "transcribe", "en"
        )

    @torch.inference_mode()
    def hear(self, sounds: Tensor, texts: list[list[str]]) -> list[list[float]]:
        """float32 [B, S], the words of each -> how likely each of them is once those before it are
        known, as the mean log-likelihood of its tokens; spelled or in figures, as is likelier."""
        features = self.storage(self.encoder.spectrum(sounds).numpy())
        encoded = self.model.model.encode(features)
        found = self.sure(encoded, features.shape[2], texts)
        others = [[figures(word) for word in text] for text in texts]
        if others == texts:
            return found
        either = zip(found, self.sure(encoded, features.shape[2], others), strict=True)
        return [[max(pair) for pair in zip(a, b, strict=True)] for a, b in either]

    def sure(self, encoded: Any, frames: int, texts: list[list[str]]) -> list[list[float]]:
        """The same of one way to write."""
        words = [[self.tokenizer.encode(f" {word}") for word in text] for text in texts]
        flat = [[token for word in text for token in word] for text in words]
        start = self.tokenizer.sot_sequence
        sure = self.model.model.align(encoded, start, flat, [frames] * len(texts))
        each = [np.log(np.maximum(part.text_token_probs, LEAST)) for part in sure]
        ends = [np.cumsum([len(word) for word in text])[:-1] for text in words]
        split = [np.split(logs, at) for logs, at in zip(each, ends, strict=True)]
        return [[float(word.mean()) for word in text] for text in split]


def figures(word: str) -> str:
    """A word as Whisper writes it, where that is not as it is spelled."""
    bare = word.strip(",.!?;:").lower()
    return word.lower().replace(bare, OTHERWISE[bare]) if bare in OTHERWISE else word


def readings(model: Model, rows: list[Row], takes: int, seed: int) -> Iterator[Reading]:
    """Every row's text, `takes` times."""
    for i, row in enumerate(rows):
        yield from (Reading(model, row, n, seed + takes * i + n) for n in range(takes))


def answerings(
    model: Model, task: Task, packs: list[Pack], count: int, takes: int, seed: int
) -> Iterator[Answering]:
    """Questions of the packs that others of their clips answer, `takes` times each."""
    answers = defaultdict[int, dict[str, str]](dict)
    questions = []
    for pack in packs:
        for row in pack.rows:
            if row.kind == f"{OWN}-answer" and row.qa is not None:
                answers[row.qa][plain(row.text)] = row.text
            if row.kind == "question" and row.qa is not None:
                questions.append((pack, row))
    questions = [(pack, row) for pack, row in questions if row.qa in answers]
    for i, (pack, row) in enumerate(
        random.Random(seed).sample(questions, min(count, len(questions)))
    ):
        wav = pack.wav(row.offset // pack.frame_samples, row.frames)[: row.samples]
        wav = F.pad(wav, (RATE_HZ // 4, 0))
        fields = {"id": row.id, "qa": row.qa, "answers": answers[row.qa], "sound": wav}
        for n in range(takes):
            yield Answering(model, task, fields, n, seed + takes * i + n)


def performed(engine: Engine, sessions: Iterable[Reading | Answering]) -> Iterator[Said]:
    """What is said, in the order in which it ends."""
    for session, event in drive(engine, sessions):
        if isinstance(event, Word):
            session.spoken.append(event)
        if isinstance(event, End) and (one := session.said()) is not None:
            yield one


def judged(model: Model, ear: Ear, takes: list[Said], window_s: float) -> list[list[float]]:
    """How likely the words of takes are that fit in a window."""
    longest = max(one.take.frames for one in takes)
    codes = torch.stack([F.pad(one.codes, (0, longest - one.take.frames)) for one in takes])
    with torch.inference_mode():
        pcm = model.mimi.decode(codes)[:, 0]
    lead, whole = round(MARGIN_S * RATE_HZ), round(window_s * RATE_HZ)
    wavs = [x[: one.take.frames * FRAME_SAMPLES] for x, one in zip(pcm, takes, strict=True)]
    sounds = torch.stack([F.pad(wav, (lead, whole - lead - len(wav))) for wav in wavs])
    return ear.hear(sounds, [one.words for one in takes])


def gathered(takes: Iterable[Said]) -> Iterator[tuple[float, list[Said]]]:
    """Takes in batches that share a window."""
    waiting: dict[float, list[Said]] = {w: [] for w in WINDOWS_S}
    for one in takes:
        long_s = one.take.frames / FRAME_HZ + 2 * MARGIN_S
        window_s = next(w for w in WINDOWS_S if w >= long_s)
        waiting[window_s].append(one)
        if len(waiting[window_s]) == BATCH:
            yield window_s, waiting[window_s]
            waiting[window_s] = []
    yield from ((window_s, batch) for window_s, batch in waiting.items() if batch)


def write(folder: Path, model: Model, takes: Iterable[Said], ear: Ear) -> list[Row]:
    """All takes into a cache without an index. -> its rows, and how sure each word is"""
    assert model.lm is not None
    info, width = describe(model.mimi), 2 * model.lm.config.residual
    facts = {"codebooks": info.codebooks, "codebook_size": info.codebook_size, "codec": info.codec}
    keep_facts(folder, {**facts, "residual": width})
    at, rows = 0, []
    with (folder / "codes.i16").open("wb") as flat:
        for window_s, batch in gathered(takes):
            for one, sure in zip(batch, judged(model, ear, batch, window_s), strict=True):
                row = asdict(replace(one.take, first=at))
                rows.append({**row, "sure": [round(x, 3) for x in sure]})
                flat.write(flattened(one.codes[None], torch.int16))
                at += one.take.frames
    with (folder / REST).open("wb") as rest:  # nothing is heard beside codes
        rest.truncate(2 * width * at)
    return rows


def weighed(rows: list[Row], reproach: float) -> Iterator[Row]:
    """What each word of each take is worth: by how many nats (one at most) it is surer than in the
    mean of the takes of the same words; less than nothing if it is less sure, times `reproach`."""
    takes = defaultdict(list)
    for row in rows:
        takes[row["text"]].append(row)
    for same in takes.values():
        sure = np.array([row["sure"] for row in same])  # [takes, words]
        better = (sure - sure.mean(0)).clip(-1, 1)
        worth = np.where(better < 0, reproach * better, better).round(3)
        for row, each in zip(same, worth.tolist(), strict=True):
            yield {**row, "worth": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("whisper", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("pack", nargs="+")
    parser.add_argument("--chat", action="store_true", help="answers to questions of the packs")
    parser.add_argument("--texts", type=int, default=1000, help="or questions")
    parser.add_argument("--takes", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["open", "world", OWN], help="of texts")
    parser.add_argument("--reproach", type=float, default=0.5, help="see `weighed`")
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True)
    model = load(args.model, dtype="fp32")
    sessions: Iterable[Reading | Answering]
    if args.chat:
        packs, task = [Pack(Path(name)) for name in args.pack], model.fit(CHAT)
        engine = Engine(model, task, args.slots, decode=False)
        sessions = answerings(model, task, packs, args.texts, args.takes, args.seed)
    else:
        lines = (line for name in args.pack for line in (Path(name) / "index.jsonl").open())
        rows = [json.loads(line) for line in lines]
        kinds = tuple(args.kinds)
        rows = [r for r in rows if r["kind"].startswith(kinds) and len(r["text"]) <= LONGEST]
        rows = random.Random(args.seed).sample(rows, min(args.texts, len(rows)))
        engine = speaking_engine(model, args.slots, decode=False)
        sessions = readings(model, rows, args.takes, args.seed)
    takes = tqdm(performed(engine, sessions), total=args.texts * args.takes, disable=None)
    found = write(args.cache, model, takes, Ear(args.whisper))
    with (args.cache / "index.jsonl").open("w") as index:
        for row in weighed(found, args.reproach):
            print(json.dumps(row), file=index)


if __name__ == "__main__":
    main()
