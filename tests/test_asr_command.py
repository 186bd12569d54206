"""`moshi asr` through the front door; a tiny random model writes nonsense, always the same."""

from __future__ import annotations

import json
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
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks.asr import transcribe
from moshi_cli.tasks.ngrams import count
from moshi_cli.tasks.subtitles import Transcript, render

Invoke = Callable[..., Any]


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags={"asr": 0.32, "chat": 0.0})
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `moshi asr` in a folder with a model and three recordings."""
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for i, seconds in enumerate((1.3, 0.9, 2.0)):
        audio.write(f"{'abc'[i]}.wav", noise(i, seconds))

    def call(*args: object, **extra: Any) -> Any:
        return CliRunner().invoke(cli.app, ["asr", *map(str, args)], **extra)

    return call


def noise(seed: int, seconds: float, channels: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(channels, round(seconds * 24_000), generator=g) * 0.2


def expected(model: Model, name: str) -> Transcript:
    return transcribe(model, audio.read(name)[0])


def test_text_of_one_file_goes_to_stdout(invoke: Invoke, model: Model) -> None:
    done = invoke("a.wav")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == render(expected(model, "a.wav"), "txt") != ""
    assert "1.3 s of audio" in done.stderr and "first word" in done.stderr


@pytest.mark.parametrize("format", ["srt", "vtt", "tsv", "alignments"])
def test_formats_on_stdout(invoke: Invoke, model: Model, format: str) -> None:
    assert invoke("a.wav", "-f", format).stdout == render(expected(model, "a.wav"), format)


def test_the_name_of_the_output_says_the_format(invoke: Invoke, model: Model) -> None:
    assert invoke("a.wav", "-o", "out.srt").exit_code == 0
    assert Path("out.srt").read_text() == render(expected(model, "a.wav"), "srt")


def test_json_tells_how_it_was_made(invoke: Invoke, model: Model) -> None:
    told = json.loads(invoke("a.wav", "-f", "json").stdout)
    assert told["text"] == expected(model, "a.wav").text
    assert told["input"] == "a.wav" and told["delay_s"] == 0.32 and told["dtype"] == "float32"
    assert told["segments"][0]["words"][0]["start"] >= 0
    bare = json.loads(invoke("a.wav", "-f", "json", "--no-word-timestamps").stdout)
    assert "words" not in bare["segments"][0]


def test_several_hypotheses(invoke: Invoke, model: Model) -> None:
    one = json.loads(invoke("a.wav", "-f", "json", "--beam-size", 1).stdout)
    assert one["text"] == expected(model, "a.wav").text and one["beam_size"] == 1
    three = json.loads(invoke("a.wav", "-f", "json", "--beam-size", 3).stdout)
    assert (three["beam_size"], three["shifts"]) == (3, 1)
    assert three["audio_s"] == one["audio_s"]
    shifted = json.loads(invoke("a.wav", "-f", "json", "--beam-size", 3, "--shifts", 2).stdout)
    assert shifted["shifts"] == 2 and shifted["audio_s"] == one["audio_s"]
    refused = invoke("a.wav", "--shifts", 2)  # of a model that is greedy
    assert (refused.exit_code, "heard once" in refused.stderr) == (2, True)
    both = invoke("a.wav", "c.wav", "-f", "txt", "--beam-size", 3, "--batch-size", 2)
    assert both.exit_code == 0 and three["text"] in both.stdout.replace("\n", " ")
    count([[1, 4, 5, 6, 2]], 2, 288).save(Path("n.safetensors"))
    told = invoke(
        "a.wav", "-f", "json", "--beam-size", 3, "--ngrams", "n.safetensors", "--lm-weight", 2
    )
    assert json.loads(told.stdout)["lm_weight"] == 2
    assert json.loads(told.stdout)["text"] != three["text"]
    refused = invoke("a.wav", "--beam-size", 2, "--ngrams", "a.wav")
    assert (refused.exit_code, "not n-grams" in refused.stderr) == (4, True)
    refused = invoke("a.wav", "--beam-size", 2, "--ngrams", "n.safetensors")
    assert (refused.exit_code, "nothing asks the n-grams" in refused.stderr) == (2, True)
    refused = invoke("a.wav", "--beam-size", 2, "--temperature", 0.5)
    assert (refused.exit_code, "no temperature" in refused.stderr) == (2, True)
    refused = invoke("a.wav", "--beam-size", 2, "--lm-weight", 0.5)
    assert (refused.exit_code, "no n-grams" in refused.stderr) == (2, True)


def test_live_events(invoke: Invoke, model: Model) -> None:
    events = [json.loads(line) for line in invoke("a.wav", "-f", "jsonl").stdout.splitlines()]
    assert events[0]["type"] == "start" and events[0]["frame_ms"] == 80
    assert events[-1]["type"] == "end" and events[-1]["audio_s"] == 1.3
    words = [event["text"] for event in events if event["type"] == "word"]
    assert words == [word.text for word in expected(model, "a.wav").words]


def test_all_formats_of_many_files(invoke: Invoke, model: Model) -> None:
    done = invoke("a.wav", "b.wav", "-f", "all", "--output-dir", "out", "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    suffixes = ("txt", "srt", "vtt", "tsv", "json", "jsonl", "alignments.json")
    assert {p.name for p in Path("out").iterdir() if "journal" not in p.name} == {
        f"{name}.{suffix}" for name in "ab" for suffix in suffixes
    }
    assert Path("out/b.srt").read_text() == render(expected(model, "b.wav"), "srt")
    side = json.loads(Path("out/a.alignments.json").read_text())
    assert side["alignments"][0][2] == "SPEAKER_MAIN"


def test_the_side_file_is_called_like_the_recording(invoke: Invoke) -> None:
    invoke("a.wav", "-f", "alignments", "--output-dir", "out")
    assert "alignments" in json.loads(Path("out/a.json").read_text())


def test_a_batch_on_stdout_keeps_its_order(invoke: Invoke) -> None:
    """Also where a later input is done first."""
    alone = "".join(invoke(f"{name}.wav").stdout for name in "cba")
    done = invoke("c.wav", "b.wav", "a.wav", "--batch-size", 3)
    assert done.exit_code == 0 and done.stdout == alone


def test_broken_items_fail_alone(invoke: Invoke) -> None:
    Path("bad.wav").write_bytes(b"RIFF no sound at all")
    for size in (1, 2):
        done = invoke("a.wav", "bad.wav", "missing.wav", "b.wav", "--output-dir", "o",
                      "--batch-size", size)  # fmt: skip
        assert done.exit_code == 3 and done.stderr.count("error:") == 2
        assert {p.name for p in Path("o").glob("*.txt")} == {"a.txt", "b.txt"}
    assert invoke("bad.wav").exit_code == 2
    assert invoke("missing.wav").exit_code == 2


@pytest.mark.parametrize("how", ["wav", "raw", "headerless wav"])
def test_sound_from_a_pipe(invoke: Invoke, how: str) -> None:
    data = Path("a.wav").read_bytes()
    args: tuple[object, ...] = ("-",)
    if how == "raw":
        data, args = data[44:], ("-", "--input-format", "s16le")
    elif how == "headerless wav":
        data = data[:40] + b"\xff\xff\xff\xff" + data[44:]
    done = invoke(*args, input=data)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == invoke("a.wav").stdout


def test_two_channels_are_two_speakers(invoke: Invoke, model: Model) -> None:
    left, right = noise(0, 1.3)[0], noise(1, 1.3)[0]
    audio.write("both.wav", torch.stack([left, right]))
    told = [json.loads(line) for line in invoke("both.wav", "-f", "jsonl", "--channel",
                                                "separate").stdout.splitlines()]  # fmt: skip
    for c, channel in enumerate(("left", "right")):
        alone = json.loads(invoke("both.wav", "-f", "json", "--channel", channel).stdout)
        words = [e["text"] for e in told if e["type"] == "word" and e["channel"] == c]
        assert " ".join(words) == alone["text"] != ""


def test_whisper_habits(invoke: Invoke) -> None:
    Path("out").mkdir()
    assert invoke("a.wav", "--output_format", "srt", "--output_dir", "out").exit_code == 0
    assert Path("out/a.srt").exists()
    done = invoke("a.wav", "--word_timestamps", "True", "--output_dir", "out")
    assert done.exit_code == 2 and "True" in done.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["a.wav", "-f", "doc"], 2, "unknown format"),
        (["a.wav", "--delay", "2"], 2, "its delays: 0.32"),
        (["a.wav", "--vad"], 4, "no pause heads"),
        (["a.wav", "b.wav", "-f", "srt"], 2, "--output-dir"),
        (["a.wav", "--max-line-count", "2"], 2, "--max-line-width"),
        (["a.wav", "-m", "nowhere"], 4, "no model at"),
        (["--mic", "a.wav"], 2, "no other input"),
        ([], 2, "no input"),
    ],
)
def test_refusals_are_one_line(invoke: Invoke, args: list[str], code: int, message: str) -> None:
    done = invoke(*args)
    assert done.exit_code == code and message in done.stderr and done.stdout == ""
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr


def test_a_model_that_cannot_listen_is_refused(invoke: Invoke, model: Model) -> None:
    save(replace(model, config=replace(model.config, lags={"chat": 0.0})), Path("mute"))
    done = invoke("a.wav", "-m", "mute")
    assert done.exit_code == 4 and "it can do: chat" in done.stderr


class FakeStream:
    """A sound device that has heard one recording, and then the user presses Ctrl-C."""

    def __init__(self, callback: Any = None, blocksize: int = 0, **_: Any) -> None:
        sound = audio.read("whole.wav")[0].numpy()
        for at in range(0, len(sound), blocksize):
            callback(sound[at : at + blocksize, None], blocksize, None, None)

    def start(self) -> None: ...
    def close(self) -> None: ...


def test_the_microphone(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from moshi_cli import devices

    fake = types.ModuleType("sounddevice")
    fake.PortAudioError = OSError  # type: ignore[attr-defined]
    fake.check_input_settings = lambda **_: None  # type: ignore[attr-defined]
    fake.InputStream = FakeStream  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    before = devices.Microphone.__next__

    def listen(self: devices.Microphone) -> Any:
        if not self.late and not self.stopped:
            raise KeyboardInterrupt
        return before(self)

    monkeypatch.setattr(devices.Microphone, "__next__", listen)
    audio.write("whole.wav", noise(7, 16 * 0.08))  # a device gives whole blocks
    done = invoke("--mic")
    assert done.exit_code == 130 and done.stdout == invoke("whole.wav").stdout


def test_without_sounddevice(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    done = invoke("--mic")
    assert done.exit_code == 6 and "pip install sounddevice" in done.stderr
