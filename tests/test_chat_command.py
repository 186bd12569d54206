"""`moshi chat` through the front door; a tiny random model answers with noise."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.chat_jobs import TalkingFlags, talking_sampling
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig, Sampling
from moshi_cli.core.errors import ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save
from moshi_cli.inputs import Item
from moshi_cli.tasks.chat import Reply, converse

Invoke = Callable[..., Any]


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"chat": 0.0})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `moshi chat` in a folder with a model and two recordings."""
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for i, samples in enumerate((20_000, 7_001)):
        g = torch.Generator().manual_seed(i)
        audio.write(f"{'ab'[i]}.wav", torch.randn(samples, generator=g) * 0.2)

    def call(*args: object, **extra: Any) -> Any:
        return CliRunner().invoke(cli.app, ["chat", *map(str, args)], **extra)

    return call


def reply(model: Model, name: str) -> Reply:
    return converse(model, audio.read(name)[0], seed=Item(name, name, "").seed(0))


def sound(source: str | bytes) -> torch.Tensor:
    return audio.read(io.BytesIO(source) if isinstance(source, bytes) else source)[0]


def test_a_reply_is_as_long_as_the_input_and_six_seconds(invoke: Invoke, model: Model) -> None:
    done = invoke("-i", "a.wav", "-o", "reply.wav")
    assert done.exit_code == 0 and done.stdout == "", done.stderr
    pcm = sound("reply.wav")
    assert len(pcm) == 20_000 + 6 * 24_000
    assert torch.allclose(pcm, reply(model, "a.wav").pcm.clamp(-1, 1), atol=1e-4)
    assert "first sound after" in done.stderr


def test_silence_around_it(invoke: Invoke) -> None:
    done = invoke("a.wav", "-o", "-", "--tail-silence", 0.1, "--lead-silence", 1)
    assert len(sound(done.stdout_bytes)) == 20_000 + 2400


def test_the_words_as_json(invoke: Invoke, model: Model) -> None:
    done = invoke("-i", "a.wav", "--text-output", "-")
    told = json.loads(done.stdout)
    said = reply(model, "a.wav")
    assert told["text"] == said.text and len(told["tokens"]) == len(said.pieces) > 0
    assert told["tokens"][0]["t"] == round(said.pieces[0].at_s, 3)
    assert told["input"] == "a.wav" and told["audio_s"] == pytest.approx(164_000 / 24_000, abs=1e-3)
    assert invoke("a.wav", "-o", "r.wav", "--text-output", "r.json").exit_code == 0
    assert json.loads(Path("r.json").read_text()) == told


def test_both_sides_in_one_file(invoke: Invoke) -> None:
    invoke("a.wav", "-o", "r.wav", "--stereo", "both.wav", "--tail-silence", 0.5)
    both = audio.read("both.wav", channel="separate")
    assert torch.equal(both[0], sound("r.wav"))
    assert torch.equal(both[1, :20_000], sound("a.wav")) and not both[1, 20_000:].any()


def test_events(invoke: Invoke) -> None:
    done = invoke("a.wav", "-o", "r.wav", "--jsonl")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = {event["type"] for event in told}
    assert {"text", "audio"} <= kinds
    assert sum(e["samples"] for e in told if e["type"] == "audio") == 164_000


def test_many_conversations(invoke: Invoke, model: Model) -> None:
    for size in (1, 2):
        folder = Path(f"o{size}")
        done = invoke("a.wav", "b.wav", "missing.wav", "--output-dir", folder, "--batch-size", size)
        assert done.exit_code == 3
        assert {p.name for p in folder.iterdir() if "journal" not in p.name} == {
            "a.wav", "a.json", "b.wav", "b.json",
        }  # fmt: skip
        pcm = sound(f"{folder}/b.wav")
        assert len(pcm) == 7001 + 6 * 24_000
        assert torch.allclose(pcm, reply(model, "b.wav").pcm.clamp(-1, 1), atol=1e-4)


def test_greedy_ignores_the_seed(invoke: Invoke) -> None:
    texts = [
        json.loads(invoke("a.wav", "--text-output", "-", *how).stdout)["tokens"]
        for how in (("--greedy",), ("--greedy", "--seed", 5), (), ("--seed", 5))
    ]
    assert texts[0] == texts[1] and texts[2] != texts[3]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["a.wav", "b.wav"], 2, "--output-dir"),
        (["a.wav", "-o", "-", "--text-output", "-"], 2, "stdout"),
        (["a.wav", "-o", "r.wav", "--text-prompt", "be kind"], 4, "--text-prompt"),
        (["a.wav", "-o", "r.wav", "--cfg-coef", "2"], 4, "--cfg-coef"),
        (["a.wav", "-o", "r.wav", "--channel", "separate"], 0, ""),
        (["a.wav", "b.wav", "--output-dir", "o", "--stereo", "x.wav"], 2, "one input"),
        (["missing.wav", "-o", "r.wav"], 2, "missing.wav"),
        (["a.wav", "--mic"], 2, "no other input"),
    ],
)
def test_refusals_are_one_line(invoke: Invoke, args: list[str], code: int, message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == code and message in done.stderr
    assert done.stderr.count("error:") == bool(code)


def test_a_pipe_gets_a_frame_for_every_frame(invoke: Invoke, tmp_path: Path) -> None:
    """Full duplex: nothing more is read before the reply to what was read is out."""
    command = [sys.executable, "-m", "moshi_cli", "chat", "-", "-o", "-", "-f", "raw",
               "--input-format", "s16le", "--tail-silence", "0", "-q"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pipe:
        assert pipe.stdin is not None and pipe.stdout is not None
        for _ in range(3):
            pipe.stdin.write(b"\1\0" * 1920)
            pipe.stdin.flush()
            assert len(pipe.stdout.read(3840)) == 3840
        pipe.stdin.write(b"\1\0" * 100)
        pipe.stdin.close()
        assert len(pipe.stdout.read()) == 200
    assert pipe.returncode == 0


class Devices(types.ModuleType):
    """A sound card in 20 lines: its user says a.wav's first frames and presses Ctrl-C."""

    PortAudioError = OSError

    def __init__(self) -> None:
        super().__init__("sounddevice")
        self.played: list[Any] = []
        self.check_input_settings = self.check_output_settings = lambda **_: None
        self.query_devices = lambda: "0 A microphone"

    def InputStream(self, callback: Any, blocksize: int, **_: Any) -> Any:
        said = audio.read("a.wav")[0].numpy()
        for at in range(0, 8 * blocksize, blocksize):
            callback(said[at : at + blocksize, None], blocksize, None, None)
        return self

    def OutputStream(self, **_: Any) -> Any:
        return self

    def write(self, block: Any) -> None:
        self.played.append(block)

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...


def test_live(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from moshi_cli import devices

    card = Devices()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    before = devices.Microphone.__next__

    def listen(self: devices.Microphone) -> Any:
        if not self.late and not self.stopped:
            raise KeyboardInterrupt
        return before(self)

    monkeypatch.setattr(devices.Microphone, "__next__", listen)
    done = invoke("--mic", "--force", "--stereo", "both.wav")
    assert done.exit_code == 130, done.stderr
    assert sum(map(len, card.played)) == 8 * 1920 and "headphones" in done.stderr
    both = audio.read("both.wav", channel="separate")
    assert torch.equal(both[1], sound("a.wav")[: 8 * 1920])
    assert done.stdout  # its words
    assert invoke("--list-devices").stdout == "0 A microphone\n"


def test_without_sounddevice(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    done = invoke("--force")
    assert done.exit_code == 6 and done.stderr.count("error:") == 1
    assert "pip install sounddevice" in done.stderr


def test_guidance_is_used_where_dialogue_learnt_it() -> None:
    plain = ModelConfig(sampling=Sampling(guidance=3.0))  # of a file, for no task by name
    assert not talking_sampling(plain, TalkingFlags()).guided
    learnt = replace(plain, samplings={"chat": Sampling(guidance=2.0, guide_text=False)})
    assert talking_sampling(learnt, TalkingFlags()).guidance == 2.0
    assert talking_sampling(learnt, TalkingFlags(cfg_coef=1.5)).guidance == 1.5
    for config in (plain, replace(plain, samplings={"chat": Sampling()})):
        with pytest.raises(ModelError):
            talking_sampling(config, TalkingFlags(cfg_coef=2.0))
