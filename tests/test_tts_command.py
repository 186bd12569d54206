"""`moshi tts` through the front door; a tiny random model says noise, always the same."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import ConditionConfig, FuserConfig, LmConfig, ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save
from moshi_cli.inputs import Item
from moshi_cli.tasks.manner import Manner
from moshi_cli.tasks.tts import speak

Invoke = Callable[..., Any]


def build(mimi: Mimi, lm: LmConfig, text: Text, **more: Any) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(mimi=mimi.config, lm=lm, lags={"tts": -0.32}, **more)
    return Model(mimi, MoshiLm(lm).eval().requires_grad_(False), text, config, "tiny")


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    return build(tiny_mimi, tiny_lm.config, tiny_text)


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `moshi tts` in a folder with a model."""
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def call(*args: object, **extra: Any) -> Any:
        return CliRunner().invoke(cli.app, ["tts", *map(str, args)], **extra)

    return call


def sound(source: str | bytes) -> torch.Tensor:
    """A recording, to the precision of 16 bits."""
    return audio.read(io.BytesIO(source) if isinstance(source, bytes) else source)[0]


def test_a_text_becomes_a_file(invoke: Invoke, model: Model) -> None:
    done = invoke("one two", "-o", "out.wav")
    assert done.exit_code == 0, done.stderr
    pcm = speak(model, "one two").pcm
    assert torch.allclose(sound("out.wav"), pcm.clamp(-1, 1), atol=1e-4)
    assert "first sound after" in done.stderr and "seed 0" in done.stderr
    assert "RTF" in done.stderr and done.stdout == ""


def test_words_may_be_arguments(invoke: Invoke) -> None:
    invoke("one", "two", "-o", "a.wav")
    invoke("--text", "one two", "-o", "b.wav")
    Path("in.txt").write_text("one\ntwo\n")
    invoke("--input-file", "in.txt", "-o", "c.wav")
    a, b, c = (Path(f"{name}.wav").read_bytes() for name in "abc")
    assert a == b == c


@pytest.mark.parametrize("how", ["auto", "all"])
def test_text_and_sound_through_pipes(invoke: Invoke, how: str) -> None:
    invoke("one two", "-o", "a.wav")
    done = invoke("-", "-o", "-", "--stream-input", how, input="one\ntwo\n")
    assert done.exit_code == 0, done.stderr
    assert torch.equal(sound(done.stdout_bytes), sound("a.wav"))
    raw = invoke("-", "-f", "raw", input="one two")
    assert raw.stdout_bytes == Path("a.wav").read_bytes()[44:]


@pytest.mark.parametrize("format", ["flac", "ogg", "raw"])
def test_formats(invoke: Invoke, format: str) -> None:
    assert invoke("one", "-o", f"a.{format}").exit_code == 0
    assert Path(f"a.{format}").stat().st_size > 100


def test_word_times_lie_beside_the_sound(invoke: Invoke, model: Model) -> None:
    assert invoke("one two", "-o", "a.wav", "--timestamps", "json").exit_code == 0
    told = json.loads(Path("a.json").read_text())
    assert told["text"] == "one two" and told["seed"] == 0
    words = [word for part in told["segments"] for word in part["words"]]
    starts = [round(word.start_s, 3) for word in speak(model, "one two").words]
    assert [word["start"] for word in words] == starts
    invoke("one two", "-o", "a.wav", "--timestamps", "srt")
    assert Path("a.srt").read_text().startswith("1\n00:00:00,")


def test_a_manifest_is_a_batch(invoke: Invoke, model: Model) -> None:
    rows = [{"id": "x/1", "text": "one"}, {"id": "2", "text": "two three"}, {"text": "go"}]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size, folder in ((1, "alone"), (3, "together")):
        done = invoke("--manifest", "m.jsonl", "--output-dir", folder, "--batch-size", size)
        assert done.exit_code == 0, done.stderr
    names = ("x/1.wav", "2.wav", "00003.wav")
    for name in names:
        one, other = sound(f"alone/{name}"), sound(f"together/{name}")
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-4)
    seed = Item("2", None, "2").seed(0)
    assert len(sound("alone/2.wav")) == len(speak(model, "two three", seed=seed).pcm)


def test_empty_texts_of_a_batch_fail_alone(invoke: Invoke) -> None:
    Path("m.jsonl").write_text('{"id": "a", "text": " "}\n{"id": "b", "text": "one"}\n')
    done = invoke("--manifest", "m.jsonl", "--output-dir", "o")
    assert (done.exit_code == 3 and "a: " in done.stderr) or "nothing to say" in done.stderr
    assert [p.name for p in Path("o").glob("*.wav")] == ["b.wav"]


def test_unknown_words_are_named(invoke: Invoke) -> None:
    done = invoke("one xylophone", "-o", "a.wav")
    assert done.exit_code == 0 and "xylophone" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "no text"),
        ([""], 2, "nothing to say"),
        (["  ", "-o", "a.wav"], 2, "nothing to say"),
        (["one", "--text", "two"], 2, "one place"),
        (["--input-file", "missing.txt", "-o", "a.wav"], 2, "cannot read"),
        (["one", "--timestamps", "srt"], 2, "-o FILE"),
        (["one", "-o", "a.mp3"], 2, "unknown audio format"),
        (["one", "--cfg-coef", "2", "-o", "a.wav"], 4, "not trained for"),
        (["one", "--voice", "anna", "-o", "a.wav"], 4, "its own"),
        (["one", "--nq", "9", "-o", "a.wav"], 4, "codebooks"),
        (["[pause:99s] one", "-o", "a.wav"], 2, "longer than"),
    ],
)
def test_refusals_are_one_line(invoke: Invoke, args: list[str], code: int, message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == code and message in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and not list(Path().glob("a.wav*"))


def test_what_is_not_text_is_refused(invoke: Invoke) -> None:
    done = invoke("-", "-o", "a.wav", input=b"one \xff\xfe two")
    assert done.exit_code == 2 and "UTF-8" in done.stderr


def test_two_voices_speak_in_turn(
    invoke: Invoke, tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text
) -> None:
    """A model like the published one: voice files, guidance as a condition, dialogues."""
    from dataclasses import replace

    conditions = (
        ConditionConfig("speaker_wavs", "tensor", 6), ConditionConfig("cfg", "lut", 4, 1, ("2.0",)),
    )  # fmt: skip
    fuser = FuserConfig(sum=("cfg",), cross=("speaker_wavs",), cross_positions=True)
    temporal = replace(tiny_lm.config.temporal, cross_attention=True)
    lm = replace(tiny_lm.config, demux=True, conditions=conditions, fuser=fuser, temporal=temporal)
    voiced = build(tiny_mimi, lm, tiny_text, kind="tts", ahead=2, voice_id="v@1")
    save(voiced, Path("voiced"))
    for name in "ab":
        save_file({"speaker_wavs": torch.randn(1, 6, 5)}, f"{name}.safetensors")
    voices = ("--voice", "a.safetensors", "--voice", "b.safetensors")
    done = invoke("A: one\nB: two", *voices, "-m", "voiced", "-o", "a.wav")
    assert done.exit_code == 0, done.stderr
    Path("m.jsonl").write_text('{"id": "t", "turns": ["one", "two"], '
                               '"voices": ["a.safetensors", "b.safetensors"]}\n')  # fmt: skip
    done = invoke("--manifest", "m.jsonl", "-m", "voiced", "--output-dir", "o", "--timestamps",
                  "json")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("o/t.json").read_text())["text"] == "one two"
    done = invoke("one", "-m", "voiced", "-o", "b.wav", "--cfg-coef", "3")
    assert done.exit_code == 2 and "choose one of 2.0" in done.stderr
    done = invoke("one", "-m", "voiced", "-o", "b.wav")
    assert done.exit_code == 0 and "makes one up" in done.stderr


class FakeStream:
    """A loudspeaker that remembers."""

    played: list[Any] = []  # noqa: RUF012

    def __init__(self, **_: Any) -> None: ...
    def write(self, block: Any) -> None:
        self.played.append(torch.from_numpy(block[:, 0].copy()))

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def test_play(invoke: Invoke, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("sounddevice")
    fake.PortAudioError = OSError  # type: ignore[attr-defined]
    fake.check_output_settings = lambda **_: None  # type: ignore[attr-defined]
    fake.OutputStream = FakeStream  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    FakeStream.played.clear()
    done = invoke("one two", "--play")
    assert done.exit_code == 0 and done.stdout_bytes == b"", done.stderr
    pcm = speak(model, "one two", manner=Manner()).pcm
    assert torch.allclose(torch.cat(FakeStream.played), pcm.clamp(-1, 1), atol=1e-5)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert invoke("one", "--play").exit_code == 6
