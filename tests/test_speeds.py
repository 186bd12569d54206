"""Speeds: copies of a recording, how sure a model is of what it wrote, and which copy is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_asr import Dictated
from torch import Tensor
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import InputError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text, Word, align
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks import speeds as speeding
from moshi_cli.tasks.asr import HearingOptions, hearing_sampling, hearing_task, transcribe
from moshi_cli.tasks.cache import encode_whole
from moshi_cli.tasks.events import End, Failed, Pause, Segment, Warning
from moshi_cli.tasks.likelihood import Examiner, Scene
from moshi_cli.tasks.loop import Give, drive
from moshi_cli.tasks.sound import Sound
from moshi_cli.tasks.speeds import NONE, Copy, Speeds, hear_best, played

SPEEDS = (0.8, 1.0, 1.25)


@pytest.fixture
def model(
    tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text, monkeypatch: pytest.MonkeyPatch
) -> Model:
    """Random weights; it writes nonsense, but always the same, and is sure of nothing."""
    monkeypatch.setattr(speeding, "LOST", 50.0)
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"asr": 0.32})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


def noise(frames: float) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(1, round(frames * 1920), generator=g) * 0.3


def driven(model: Model, session: Copy) -> None:
    """To its end."""
    task = hearing_task(model.config)
    engine = Engine(model, task, 1, sampling=hearing_sampling(model.config))
    assert [type(event) for _, event in drive(engine, [session])] == [End]


def observed(copy: Copy, kept: list[int]) -> Copy:
    """It notes how many frames it keeps."""
    feed = copy.feed

    def noted() -> Tensor | Give:
        kept.append(len(copy.frames))
        return feed()

    copy.feed = noted  # type: ignore[method-assign]
    return copy


def copies_of(model: Model, source: Any, speeds: tuple[float, ...] = SPEEDS) -> Speeds:
    options = HearingOptions(refresh_s=0.0)
    return Speeds(model, hearing_task(model.config), source, speeds, options=options)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("frame", [700, 1920])
def test_a_copy_is_so_many_times_as_quick_and_as_high(speed: float, frame: int) -> None:
    seconds = 1.3
    time_s = torch.arange(round(seconds * 24_000)) / 24_000
    wave = (440 * 2 * math.pi * time_s).sin()[None]
    parts = list(played(wave.split(frame, 1), speed))
    assert all(part.shape == (1, 1920) for part in parts[:-1]) and parts[-1].shape[1] <= 1920
    copy = torch.cat(parts, 1)[0]
    assert len(copy) == pytest.approx(seconds * 24_000 / speed, abs=1)
    strength = torch.fft.rfft(copy * torch.hann_window(len(copy))).abs()
    assert int(strength.argmax()) * 24_000 / len(copy) == pytest.approx(440 * speed, abs=2)
    if speed == 1:
        assert torch.equal(copy, wave[0])


def test_nothing_stays_nothing() -> None:
    assert list(played([], 1.25)) == list(played([], 1.0)) == []


def test_doubt_is_what_the_words_cost_the_model(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = hearing_task(model.config)
    copy = Copy(model, task, Sound(noise(30)), 1.0, options=HearingOptions())
    driven(model, copy)
    words = [event for event in copy.events if isinstance(event, Word)]
    heard = torch.nn.functional.pad(noise(30), (0, (copy.heard - 30) * 1920))
    assert model.lm is not None and model.text is not None
    scene = Scene(
        encode_whole(model.mimi, heard)[0], tuple((w.text, w.start_s, w.end_s) for w in words)
    )
    nats, tokens = Examiner(model.lm, model.text, task).examine([scene])[0]["words"]
    assert copy.tokens == tokens > 5 and not copy.frames and not copy.words
    assert copy.doubt == pytest.approx(nats / tokens, rel=1e-3)
    monkeypatch.setattr(speeding, "LOST", 1.5)
    cut = Copy(model, task, Sound(noise(30)), 1.0, options=HearingOptions())
    driven(model, cut)
    assert 0 < cut.doubt <= 1.5 < copy.doubt


@pytest.mark.parametrize(("refresh_s", "stretch"), [(1.0, 750), (0.0, 18)])
def test_stretches_are_examined_as_they_end(
    model: Model, monkeypatch: pytest.MonkeyPatch, refresh_s: float, stretch: int
) -> None:
    """A long recording is not kept; every word is asked for once."""
    monkeypatch.setattr(speeding, "STRETCH", stretch)
    assert model.text is not None
    said = [("one", 0.4, 0.7), ("two", 0.8, 1.1), ("three", 3.4, 3.9)]
    engine = Dictated(align(said, 60, model.text).tolist())
    sound = torch.cat([noise(16), torch.zeros(1, 24 * 1920), noise(10)], 1)
    options = HearingOptions(refresh_s=refresh_s)
    copy = Copy(model, hearing_task(model.config), Sound(sound), 1.0, options=options)
    kept: list[int] = []
    for _ in drive(engine, [observed(copy, kept)]):  # type: ignore[arg-type]
        pass
    assert (engine.opened > 1) == bool(refresh_s) and max(kept) < 40
    assert copy.first == copy.heard and not copy.frames and not copy.words
    assert [e.text for e in copy.events if isinstance(e, Word)] == [word for word, *_ in said]
    assert copy.tokens == sum(len(model.text.encode(word)) for word, *_ in said)


def test_the_surest_copy_is_told_by_the_clock_of_the_recording(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = copies_of(model, noise(26.5).split(1920, 1))
    assert [copy.speed for copy in copies.sessions] == [0.8, 1.0, 1.25]
    monkeypatch.setattr(Copy, "doubt", property(lambda copy: abs(copy.speed - 1.25)))
    quick = copies.sessions[2]
    quick.events = [
        Word("one", 0.4, 0.8), Pause(0.8, (0.9,)), Word("two", 1.2, 1.52), Word("six", 1.6, 9.0),
        Segment(7, (Word("one", 0.4, 0.8),)), Warning("stall", "silence", 1.0),
    ]  # fmt: skip
    for part in copies.sound:
        assert part.shape[0] == 1
    assert list(copies.end()) == list(copies.end()) == []
    told = list(copies.end())
    words = [Word("one", 0.5, 1.0), Word("two", 1.5, 1.9), Word("six", 2.0, 26.5 * 0.08)]
    assert [event for event in told if isinstance(event, Word)] == words
    assert [e.at_s for e in told if isinstance(e, Pause | Warning)] == [1.0, 1.25]
    (segment,) = (event for event in told if isinstance(event, Segment))
    assert segment.words == tuple(words) and told[-1] is segment


def test_silence_is_not_worse_than_words_nobody_is_sure_of(model: Model) -> None:
    copies = copies_of(model, [])
    slow, plain, quick = copies.sessions
    slow.missed, slow.tokens = 5 * (NONE + 0.1), 5
    assert min(copies.sessions, key=lambda copy: copy.doubt) is plain
    quick.missed, quick.tokens = 5 * (NONE - 0.1), 5
    assert min(copies.sessions, key=lambda copy: copy.doubt) is quick


def test_one_speed_is_hearing_as_usual(model: Model) -> None:
    wav = noise(20.3)
    assert hear_best(model, wav[0], [1.0]).words == transcribe(model, wav[0]).words != ()
    best = hear_best(model, wav.split(1920, 1), SPEEDS)
    assert best.audio_s == pytest.approx(20.3 * 0.08)
    alone = [hear_best(model, wav, [speed]).words for speed in SPEEDS]
    assert best.words in alone and len(set(alone)) == 3


def test_a_broken_recording_fails(model: Model) -> None:
    def broken() -> Iterator[Tensor]:
        yield from noise(3).split(1920, 1)
        raise InputError("half a file")

    copies = copies_of(model, broken())
    engine = Engine(model, hearing_task(model.config), 3)
    failed = [event.error for _, event in drive(engine, copies.sessions) if type(event) is Failed]
    assert [str(error) for error in failed] == ["half a file"]
    with pytest.raises(InputError, match="half a file"):
        hear_best(model, broken(), SPEEDS)


# The command --------------------------------------------------------------------------------------


def invoke(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, args)])


@pytest.fixture
def place(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for i, name in enumerate("ab"):
        audio.write(f"{name}.wav", noise(16 + 3.4 * i))
    return tmp_path


def test_the_command_keeps_the_surest(place: Path, model: Model) -> None:
    done = invoke("asr", "a.wav", "--speeds", "0.8,1,1.25", "-f", "json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    best = hear_best(model, audio.read("a.wav")[0], SPEEDS)
    assert told["text"] == " ".join(word.text for word in best.words) != ""
    assert told["speeds"] == [0.8, 1.0, 1.25]
    assert " 1.28 s of audio" in done.stderr  # whatever a copy's is
    lines = invoke("asr", "a.wav", "--speeds", "0.8,1,1.25").stdout.split()
    assert lines == told["text"].split()


def test_a_batch_gives_what_one_by_one_gives(place: Path) -> None:
    alone = [invoke("asr", f"{name}.wav", "--speeds", "1,1.25").stdout for name in "ab"]
    both = invoke("asr", "a.wav", "b.wav", "--speeds", "1,1.25", "--batch-size", 2)
    assert both.exit_code == 0 and both.stdout == "".join(alone)
    assert invoke("asr", "a.wav", "--speeds", "1").stdout == invoke("asr", "a.wav").stdout


def test_two_channels_may_be_kept_at_different_speeds(place: Path, model: Model) -> None:
    pair = torch.cat([noise(20), noise(20).flip(1)])
    audio.write("pair.wav", pair)
    wav = audio.read("pair.wav", channel="separate")
    best = [hear_best(model, channel, SPEEDS).words for channel in wav]
    done = invoke(
        "asr", "pair.wav", "--channel", "separate", "--speeds", "0.8,1,1.25", "-f", "jsonl"
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for c, words in enumerate(best):
        found = [e["text"] for e in events if e["type"] == "word" and e["channel"] == c]
        assert found == [word.text for word in words]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a.wav", "--speeds", "fast"], "--speeds fast: not numbers"),
        (["a.wav", "--speeds", "1,,1.1"], "not numbers"),
        (["a.wav", "--speeds", "1,9"], "a speed is 0.5 to 2"),
        (["a.wav", "--speeds", "nan"], "a speed is 0.5 to 2"),
        (["--mic", "--speeds", "1,1.1"], "--speeds needs a recording"),
    ],
)
def test_refusals_are_one_line(place: Path, args: list[str], message: str) -> None:
    done = invoke("asr", *args)
    assert done.exit_code == 2
    (line,) = (line for line in done.stderr.splitlines() if "error" in line)
    assert message in line


def test_an_evaluation_hears_so_too(place: Path, model: Model) -> None:
    Path("a.txt").write_text("one two")
    done = invoke("eval", "asr", "a.wav", "--speeds", "0.8,1,1.25", "-o", "figures")
    assert done.exit_code == 0, done.stderr
    (row,) = (json.loads(line) for line in Path("figures/items.jsonl").open())
    best = hear_best(model, audio.read("a.wav")[0], SPEEDS)
    assert row["hypothesis"] == " ".join(word.text for word in best.words)
    assert all(at >= 16 * 0.08 for at in row["emitted_s"])
    context = json.loads(Path("figures/report.json").read_text())
    assert context["context"]["settings"]["speeds"] == [0.8, 1.0, 1.25]
