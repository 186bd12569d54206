"""Cached codes: what a language model is trained on, made once from packs by the codec.

A cache is a folder: `codes.i16` (flat int16 [frames, Q]), `index.jsonl`, a row per take, and
`cache.json`, whose codec it was; or a folder of such folders, its shards. For models that hear what
codes leave of a voice there is `residual.f16` beside them (float16 [frames, 2 · dim]). A take is a
clip with silence before and after it, perhaps louder, softer or noisier than it was, or a piece of
a longer recording; of a conversation it has two lines, the own voice and then the partner, as long
as each other. Words are timed from the take's own start. Same seed, same takes: a stopped job goes
on where it was.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moshi_cli.core.errors import InputError
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import ZERO
from moshi_cli.tasks.augment import colored_noise
from moshi_cli.tasks.codec import describe
from moshi_cli.tasks.data import Pack, Row
from moshi_cli.tasks.randomness import generator_of, rng_of

FRAME_HZ = 12.5
SILENCE = "silence"  # kind of the take that is nothing but silence
HISS = "hiss"  # kind of takes that are faint noise
REST = "residual.f16"
CHUNK_FRAMES = 250  # encoded at once: longer sound goes through the codec as a stream

Words = tuple[tuple[str, float, float], ...]  # word, start, end in seconds


@dataclass(frozen=True)
class Variant:
    """How a clip becomes a take. Ranges are drawn from evenly."""

    lead_s: tuple[float, float] = (0.0, 0.5)  # silence before
    tail_s: tuple[float, float] = (0.8, 0.8)  # silence after
    gain_db: tuple[float, float] = (0.0, 0.0)
    speed: tuple[float, float] = (1.0, 1.0)  # pitch and formants move along: another speaker
    noise: float = 0.0  # probability of noise, lead and tail included
    snr_db: tuple[float, float] = (10.0, 35.0)  # against the clip's mean power


@dataclass(frozen=True)
class Take:
    """One row of a cache; times in seconds from the take's start."""

    id: str
    kind: str
    voice: str
    text: str
    words: Words
    first: int  # frame in codes.i16
    frames: int
    qa: int | None = None
    part: int = 0  # which folder of the cache
    lines: int = 1  # voices; the codes of one follow those of the other
    partner_words: Words = ()
    crc: int | None = None  # CRC-32 of its codes as they lie in codes.i16
    worth: tuple[float, ...] = ()  # of each word's codes, for who learns to say them; (): 1

    @property
    def end(self) -> int:
        """Frame in codes.i16 after its last one."""
        return self.first + self.lines * self.frames


def draw(low_high: tuple[float, float], generator: torch.Generator) -> float:
    """Evenly from a range."""
    low, high = low_high
    return low + (high - low) * float(torch.rand((), generator=generator))


Sound = tuple[Tensor, Words] | tuple[Tensor, Words, Words]  # of the own voice, of the partner


class Job(Protocol):
    """Something to encode: `row` says what it is, `sound` makes it (float32 [S] or [lines, S])."""

    @property
    def row(self) -> Row: ...

    def sound(self, generator: torch.Generator, rate: int) -> Sound: ...


@dataclass(frozen=True)
class Clip:
    """A clip of a pack, as a variant of itself."""

    pack: Pack
    row: Row
    variant: Variant

    def sound(self, generator: torch.Generator, rate: int) -> tuple[Tensor, Words]:
        """float32 [S] and the words in it."""
        first = self.row.offset // self.pack.frame_samples
        wav = self.pack.wav(first, self.row.frames)[: self.row.samples]
        return compose(wav, self.row, self.variant, generator, rate)


@dataclass(frozen=True)
class Hiss:
    """Faint noise of a colour and level drawn evenly; a silent line."""

    row: Row
    seconds: float = 20.0
    level_db: tuple[float, float] = (-80.0, -40.0)  # rms

    def sound(self, generator: torch.Generator, rate: int) -> tuple[Tensor, Words]:
        """float32 [S], no words."""
        noise = colored_noise(round(self.seconds * rate), rng_of(generator))
        return torch.from_numpy(noise) * 10 ** (draw(self.level_db, generator) / 20), ()


def stretched(wav: Tensor, speed: float) -> Tensor:
    """The same sound played faster or slower. float32 [S] -> [S / speed]"""
    size = round(len(wav) / speed)
    if size == len(wav) or not len(wav):
        return wav
    return torch.fft.irfft(torch.fft.rfft(wav), size) * (size / len(wav))


def compose(
    wav: Tensor, row: Row, variant: Variant, generator: torch.Generator, rate: int
) -> tuple[Tensor, Words]:
    """A clip float32 [S] and its row -> the take's sound [S'] and its words, in place."""
    lead, tail = (round(draw(r, generator) * rate) for r in (variant.lead_s, variant.tail_s))
    length, wav = len(wav), stretched(wav, draw(variant.speed, generator))
    pace = len(wav) / max(length, 1)
    wav = wav * 10 ** (draw(variant.gain_db, generator) / 20)
    power = float(wav.square().sum()) / max(len(wav), 1) + 1e-10
    sound = F.pad(wav, (lead, tail))
    if float(torch.rand((), generator=generator)) < variant.noise:
        noise = torch.from_numpy(colored_noise(len(sound), rng_of(generator)))
        sound = sound + noise * (power * 10 ** (-draw(variant.snr_db, generator) / 10)) ** 0.5
    sound = sound * (0.99 / max(0.99, float(sound.abs().max())))
    words = tuple((w, s * pace + lead / rate, e * pace + lead / rate) for w, s, e in row.words)
    return sound, words


@torch.no_grad()
def write_cache(
    mimi: Mimi,
    jobs: Iterable[Job],
    folder: Path,
    *,
    seed: int = 0,
    residual: bool = False,
    settings: Mapping[str, Any] | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> int:
    """Encode every job into a cache; what is already there stays. Returns the number of takes.

    residual: keep what the codes leave, too. settings: what else the takes depend on. InputError if
    the cache was made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, flat = folder / "index.jsonl", folder / "codes.i16"
    info = describe(mimi)
    facts = {"codebooks": info.codebooks, "codebook_size": info.codebook_size, "codec": info.codec}
    width = 2 * mimi.config.quantizer.dim if residual else 0
    keep_facts(folder, {**facts, "seed": seed, "residual": width, **(settings or {})})
    if index.exists():  # a row that was being written is written again
        text = index.read_bytes()
        os.truncate(index, text.rfind(b"\n") + 1)
    done = read_takes(index) if index.exists() else []
    end = done[-1].end if done else 0
    mimi.eval()
    with ExitStack() as files:
        codes = files.enter_context(opened(flat, 2 * info.codebooks * end))
        rest = files.enter_context(opened(folder / REST, 2 * width * end)) if width else None
        rows = files.enter_context(index.open("a"))
        count = 0
        for count, job in enumerate(jobs, 1):
            if count <= len(done):
                continue
            row = job.row
            sound, *words = job.sound(generator_of(seed, count), mimi.sample_rate)
            lines, left = encode_whole(mimi, sound if sound.dim() == 2 else sound[None])
            data = flattened(lines, torch.int16)
            codes.write(data)
            codes.flush()
            if rest is not None:
                rest.write(flattened(left, torch.float16))
                rest.flush()
            take = Take(
                row.id, row.kind, row.voice, row.text, words[0], end, lines.shape[2], row.qa,
                lines=len(lines), partner_words=words[1] if len(words) > 1 else (),
                crc=zlib.crc32(data),
            )  # fmt: skip
            rows.write(json.dumps(asdict(take)) + "\n")
            rows.flush()
            end = take.end
            report(count)
    return count


def opened(path: Path, size: int) -> BinaryIO:
    """A file of which the first `size` bytes stay, to go on after them."""
    file = path.open("r+b" if path.exists() else "wb")
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def flattened(lines: Tensor, dtype: torch.dtype) -> bytes:
    """[lines, N, T] -> [lines, T, N] in a file."""
    return lines.transpose(1, 2).to(dtype).contiguous().numpy().tobytes()


def keep_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write cache.json, or compare with the one that is there."""
    path, facts = folder / "cache.json", dict(facts)
    if not path.exists():
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return
    before = read_facts(folder)
    before = {"residual": 0, **before}  # not said by older ones
    for key in facts:
        if before.get(key) != facts[key]:
            raise InputError(
                f"{folder}: was made with {key} {before.get(key)!r}, not {facts[key]!r}",
                "name another folder, or do as before to go on",
            )


def read_facts(folder: Path) -> dict[str, Any]:
    """cache.json; empty if there is none. InputError if it cannot be read."""
    path = folder / "cache.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read ({error})") from None


def encode_lines(mimi: Mimi, sound: Tensor) -> Tensor:
    """sound float32 [lines, S] -> codes long[lines, Q, T], in bounded memory."""
    return encode_whole(mimi, sound)[0]


@torch.no_grad()
def encode_whole(mimi: Mimi, sound: Tensor) -> tuple[Tensor, Tensor]:
    """sound float32 [lines, S] -> codes long[lines, Q, T] and what they leave [lines, 2 · dim, T],
    in bounded memory."""
    device, chunk = next(mimi.parameters()).device, CHUNK_FRAMES * mimi.frame_samples
    sound = F.pad(sound, (0, -sound.shape[-1] % mimi.frame_samples))[:, None]  # [lines, 1, S]
    if sound.shape[-1] <= chunk:
        codes, left = mimi.encode_whole(sound.to(device))
        return codes.cpu(), left.cpu()
    state = mimi.init_state(len(sound), device=device).encoder
    parts = [mimi.encode_whole(part.to(device), state) for part in sound.split(chunk, dim=2)]
    return torch.cat([c.cpu() for c, _ in parts], 2), torch.cat([r.cpu() for _, r in parts], 2)


def parse_take(data: Mapping[str, Any]) -> Take:
    """A row of a cache. ValueError, KeyError or TypeError if it is none."""
    names = {f.name for f in fields(Take)}
    words = {
        key: tuple((str(w), float(s), float(e)) for w, s, e in data.get(key, ()))
        for key in ("words", "partner_words")
    }
    worth = tuple(float(w) for w in data.get("worth", ()))
    return Take(**{**{k: v for k, v in data.items() if k in names}, **words, "worth": worth})


def read_takes(index: Path) -> list[Take]:
    """The rows of a cache. Raises InputError naming file and line."""
    takes = []
    with index.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                takes.append(parse_take(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index}:{number}: not a row of a cache ({error!r})") from error
    return takes


def is_cache(place: str | Path) -> bool:
    """Whether a folder is a cache of codes, or has some within it."""
    folder = Path(place)
    return (folder / "codes.i16").is_file() or any(folder.glob("*/codes.i16"))


def shards(folder: Path) -> list[Path]:
    """The folder itself, or the caches within it. InputError if there are none."""
    if (folder / "index.jsonl").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/index.jsonl"))
    if not found:
        raise InputError(f"{folder}: not a cache of codes")
    return found


class Cache:
    """One or more folders of takes. `codes` int16 [frames, Q] per folder, memory-mapped, and, if
    `residual` is their width, what they leave, float16 [frames, residual]."""

    def __init__(
        self, folders: str | Path | Sequence[str | Path], codebooks: int, residual: int = 0
    ):
        several = [folders] if isinstance(folders, str | Path) else list(folders)
        self.codebooks, self.residual = codebooks, residual
        self.takes: list[Take] = []
        self.parts: list[np.ndarray] = []
        self.rests: list[np.ndarray] = []
        for folder in (part for place in several for part in shards(Path(place))):
            has = read_facts(folder).get("codebooks", codebooks)
            if has != codebooks:
                raise InputError(f"{folder}: has {has} codebooks, the model has {codebooks}")
            takes = read_takes(folder / "index.jsonl")
            if not takes:
                continue
            end = max(t.end for t in takes)
            if residual:
                wide = read_facts(folder).get("residual", 0)
                if wide != residual:
                    hint = "`moshi data encode --residual`, with the model's codec"
                    text = (
                        f"has {wide} numbers a frame beside its codes, the model hears {residual}"
                    )
                    raise InputError(f"{folder}: {text}", hint)
                self.rests.append(mapped(folder / REST, np.float16, end, residual))
            self.takes += [replace(t, part=len(self.parts)) for t in takes]
            self.parts.append(mapped(folder / "codes.i16", np.int16, end, codebooks))

    def read(self, take: Take, first: int = 0, frames: int | None = None, line: int = 0) -> Tensor:
        """Codes of one voice from frame `first` on, at most `frames`. -> long[Q, T]; float32
        [Q + residual, T] with what they leave below them, if that is asked for."""
        start, end = take.first + line * take.frames, take.first + (line + 1) * take.frames
        last = end if frames is None else min(start + first + frames, end)
        codes = self.parts[take.part][start + first : last]
        if not self.residual:
            return torch.from_numpy(codes.astype(np.int64)).t()
        left = self.rests[take.part][start + first : last]
        return torch.from_numpy(np.concatenate([codes, left], 1, dtype=np.float32)).t()

    def nothing(self, frames: int) -> Tensor:
        """The same of a voice that is not there: ZERO, and no residual."""
        codes = torch.full((self.codebooks, frames), ZERO)
        return torch.cat([codes, torch.zeros(self.residual, frames)]) if self.residual else codes


def mapped(path: Path, dtype: type, frames: int, width: int) -> np.ndarray:
    """The first frames of a flat file, [frames, width]. InputError if it has fewer."""
    flat = np.memmap(path, dtype, "r")
    if len(flat) < frames * width:
        raise InputError(f"{path.parent}: {path.name} is shorter than its index says")
    return flat[: frames * width].reshape(-1, width)
