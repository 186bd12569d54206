"""`moshi eval interrupt`: who is interrupted, when, and when a reply is over."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.errors import InputError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import PAD, Text
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.evaluation import read_result
from moshi_cli.tasks.events import Event, Speech
from moshi_cli.tasks.interruption import (
    Breach,
    Interrupted,
    figures,
    goes_on_s,
    spoken_part,
)
from moshi_cli.tasks.loop import Give, Output
from moshi_cli.tasks.sound import FRAME_SAMPLES

FRAME = torch.ones(1, FRAME_SAMPLES)


def noise(seconds: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(round(seconds * 24_000), generator=g) * 0.2


def told(frames: Iterable[Tensor], now_at: int | None, breach: Breach) -> list[str]:
    """q: the question, x: the interruption, .: silence; told of speech after so many frames."""
    found = []
    for i, frame in enumerate(frames):
        found.append({0.0: ".", 1.0: "q", 2.0: "x"}[float(frame[0, 0])])
        breach.now = now_at is not None and i >= now_at
    return found


@pytest.mark.parametrize(
    ("then", "now_at", "at", "heard"),
    [
        (3, 4, 5, "qq" + "..." + "xxx" + "." * 38),  # frame 4 is heard, the next one interrupts
        (3, 0, 2, "qq" + "xxx" + "." * 38),  # never into the question
        (3, None, None, "qq" + "." * 5 + "." * 38),  # patience ends
        (None, 4, None, "qq" + "." * 5 + "." * 38),
    ],
)
def test_what_the_partner_says(
    then: int | None, now_at: int | None, at: int | None, heard: str
) -> None:
    said = None if then is None else 2 * torch.ones(then * FRAME_SAMPLES)
    breach = Breach(torch.ones(2 * FRAME_SAMPLES), said, patience_s=0.4)
    assert "".join(told(breach, now_at, breach)) == heard  # 3 s of silence at the end
    assert breach.at == at and breach.frames == 2


def test_the_partner_breaks_in_when_the_model_has_spoken(model: Model) -> None:
    """A reply that begins with frame 6 of the conversation; 0.4 s of it are frames 6 to 10."""
    breach = Breach(noise(0.16), noise(0.4, 1))
    session = Interrupted(model, CHAT, breach)
    quiet, loud = (torch.zeros(1, FRAME_SAMPLES), noise(0.08, 2)[None])
    pcm = 0
    for i in range(20):
        fed = session.feed()
        if i == 0:
            assert fed is Give.NOTHING
            continue
        at = i - 1
        for event in session.take(Output(PAD, loud if at >= 6 else quiet)):
            pcm += isinstance(event, Speech)
        assert breach.now == (at >= 11), at  # a voice counts once two frames of it were loud
    assert breach.at == 12 and pcm == 19


def test_how_long_a_reply_goes_on() -> None:
    """Speech from 1 to 2 s and, after a pause of 0.4 s, to 3 s; then, after 0.6 s, again."""
    parts = [torch.zeros(24_000), noise(1.0), torch.zeros(9600), noise(0.6), torch.zeros(14_400)]
    reply = torch.cat([*parts, noise(0.4)])
    assert goes_on_s(reply, 1.5) == pytest.approx(1.5, abs=0.021)
    assert goes_on_s(reply, 2.2) == pytest.approx(0.8, abs=0.021)  # in the pause
    assert goes_on_s(reply, 3.3) == goes_on_s(reply, 0.5) == 0
    assert goes_on_s(torch.zeros(0), 1.0) == 0


def test_the_interruption_has_no_silence_in_front() -> None:
    part = spoken_part(torch.cat([torch.zeros(12_000), noise(0.5)]), "x")
    assert abs(len(part) - 12_000) <= 480
    with pytest.raises(InputError, match="x: nobody speaks in it"):
        spoken_part(torch.zeros(24_000), "x")


def test_figures_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"at_s": 2.0, "alone_s": 2.0, "stop_s": 0.4},
        {"at_s": 2.0, "alone_s": 1.2, "stop_s": 1.2},  # went on
        {"at_s": 2.0, "alone_s": 0.7, "stop_s": 0.0},  # would have stopped anyway
        {"at_s": None},  # no answer
        {"error": "unreadable"},
    ]
    found = {name: f.value for name, f in figures(rows).items()}
    assert found == pytest.approx({
        "stopped": 0.5, "stop_delay": 0.8, "goes_on_alone": 1.6, "answered": 0.75,
        "interruptible": 2 / 3,
    })  # fmt: skip
    found = {name: f.value for name, f in figures(rows, within_s=0.5).items()}
    assert found["stopped"] == pytest.approx(2 / 3) and found["interruptible"] == 1
    assert set(figures([{"at_s": None}])) == {"answered"}


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"chat": 0.0})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for i, name in enumerate("abc"):
        audio.write(f"{name}.wav", torch.cat([torch.zeros(2400 * i), noise(0.5, i)]))
    lines = (json.dumps({"id": n, "path": f"{n}.wav", "text": f"ask {n}"}) for n in "abc")
    Path("m.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def call(*args: object) -> Any:
        return CliRunner().invoke(cli.app, ["eval", "interrupt", *map(str, args)])

    return call


def test_both_conversations_are_the_same_until_somebody_breaks_in(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[int, list[Tensor]] = {}
    breaches: dict[int, Breach] = {}
    alive: list[Interrupted] = []  # or the next one may have the same id
    take = Interrupted.take

    def spy(self: Interrupted, output: Output) -> Iterable[Event]:
        alive.append(self)
        for event in take(self, output):
            if isinstance(event, Speech):
                replies.setdefault(id(self), []).append(event.pcm)
            yield event
        breaches[id(self)] = self.breach

    monkeypatch.setattr(Interrupted, "take", spy)
    done = invoke("--manifest", "m.jsonl", "-o", "out", "--json", "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    alone, broken = (
        [
            torch.cat(replies[key], 1)
            for key, breach in breaches.items()
            if (breach.then is None) == n
        ]
        for n in (True, False)
    )
    rows = read_result(Path("out")).items
    assert [row["question"] for row in rows] == ["ask a", "ask b", "ask c"]
    assert [row["interrupted_by"] for row in rows] == ["b", "c", "a"]
    for row, a, b in zip(rows, alone, broken, strict=True):
        assert row["at_s"] is not None  # random weights are loud at once
        same = round(row["at_s"] * 24_000)
        assert torch.equal(a[:, :same], b[:, :same]) and not torch.equal(a, b)
        stereo = audio.read(Path("out") / row["audio"], channel="separate")
        assert torch.allclose(stereo[0, : b.shape[1]], b[0].clamp(-1, 1), atol=1e-4)
        assert stereo[1, same : same + 4800].abs().mean() > 0.1
    told = json.loads(done.stdout)
    assert told["figures"]["answered"]["value"] == 1


def test_broken_recordings_and_single_ones(invoke: Callable[..., Any]) -> None:
    audio.write("c.wav", torch.zeros(12_000))
    done = invoke("--manifest", "m.jsonl")
    assert done.exit_code == 3 and "c: nobody speaks in it" in done.stderr  # b's partner is c
    done = invoke("a.wav")
    assert done.exit_code == 2 and "one recording cannot interrupt another" in done.stderr
    done = invoke("a.wav", "-")
    assert done.exit_code == 2 and "standard input is not heard twice" in done.stderr
