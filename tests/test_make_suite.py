"""The figures of the built-in model: its test set, and the way through the command."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_eval_command import SPEC, Invoke, invoke, model

from moshi_cli.tasks.evaluation import Figure, Result, write_result

__all__ = ["invoke", "model"]  # fixtures

RECIPE = Path(__file__).parent.parent / "examples" / "train_builtin"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of the recipe can be imported; afterwards they are forgotten."""
    monkeypatch.syspath_prepend(str(RECIPE))
    own = {path.stem for path in RECIPE.glob("*.py")}
    for name in own & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in own & set(sys.modules):
        del sys.modules[name]


@pytest.mark.usefixtures("recipe")
def test_strings_hold_every_digit_of_the_held_out_speaker_once(tmp_path: Path) -> None:
    import recordings

    words = "zero one two three four five six seven eight nine".split()
    row = {"file": "a.flac", "start": 0.1, "end": 0.4}
    lines = [
        {**row, "id": f"{d}_{who}_{take}", "text": words[d], "speaker": who}
        for d in range(10) for who in ("nicolas", "jackson") for take in range(3)
    ]  # fmt: skip
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    soundfile.write(tmp_path / "a.flac", np.full(8000, 0.25, np.float32), 8000)
    clips = recordings.digit_clips(tmp_path, tmp_path / "clips")
    assert len(clips) == 30 and soundfile.info(clips[0].path).frames == 2400
    strings = recordings.digit_strings(clips, tmp_path / "strings")
    said = [word for string in strings for word in string.text.split()]
    assert sorted(said) == sorted(clip.text for clip in clips)
    for string in strings[:-1]:
        count = len(string.text.split())
        sound, rate = soundfile.read(string.path)
        assert 4 <= count <= 6 and np.count_nonzero(sound) == 2400 * count
        assert 0.2 * (count + 1) <= len(sound) / rate - 0.3 * count <= 0.4 * (count + 1)
    again = recordings.digit_strings(clips, tmp_path / "again")
    assert [string.text for string in again] == [string.text for string in strings]


def corpus(folder: Path) -> None:
    """A test set of make_tests.py and a set of digits, of a second each."""
    folder.mkdir()
    row = {"start": 0.0, "end": 0.5, "voice": {"x": 1.0}}
    kinds = {"a": "world", "b": "question", "c": "question", "d": "open"}
    lines = [
        {
            **row,
            "id": n,
            "file": f"{n}.wav",
            "kind": k,
            "text": f"Say {n}.",
            "qa": i,
            "words": [["Say", 0.0, 0.2], [f"{n}.", 0.2, 0.5]],
        }
        for i, (n, k) in enumerate(kinds.items())
    ]
    for name in kinds:
        late = np.repeat([0.0, 0.1], 4000)
        soundfile.write(folder / f"{name}.wav", late, 8000)
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "tts_open.jsonl").write_text('{"id": "o", "text": "We ate late."}')
    (folder / "tts_texts.jsonl").write_text('{"id": "t", "text": "Go left."}')
    digits = folder / "digits"
    digits.mkdir()
    soundfile.write(digits / "a.wav", np.full(8000, 0.1), 8000)
    digit = {"file": "a.wav", "start": 0.1, "end": 0.4, "speaker": "nicolas", "text": "one"}
    rows = [json.dumps({**digit, "id": f"d{i}"}) for i in range(3)]
    (digits / "manifest.jsonl").write_text("\n".join(rows))
    prompts = folder / "prompts"
    prompts.mkdir()
    soundfile.write(prompts / "a.wav", np.full(8000, 0.1), 8000)
    prompt = {"file": "a.wav", "start": 0.0, "end": 1.0, "speaker": "somebody"}
    texts = ["Added.", "That is not a number."]  # one word is too short
    rows = [json.dumps({**prompt, "id": f"p{i}", "text": text}) for i, text in enumerate(texts)]
    (prompts / "manifest.jsonl").write_text("\n".join(rows))


FIGURES = {  # name of an entry -> what its table shows
    "asr": "wer wer/world wer/question", "asr-open": "wer", "asr-real": "wer",
    "asr-silence": "words_in_silence", "lag-0.32": "wer wer/open wer/world",  # no word is right
    "digits-single": "wer exact", "digits-strings": "wer exact", "tts": "wer unspoken_words",
    "tts-open": "wer unspoken_words", "codec": "wer_added stoi original_wer mel_db bitrate",
    "chat": "written_exact heard_right both written_holds heard_exact heard_wer",
    "interrupt": "stopped stop_delay goes_on_alone answered interruptible",
    "chat-silence": "silent_replies", "speed-asr": "rtf", "speed-tts": "rtf first_audio",
    "speed-chat": "rtf",
}  # fmt: skip


@pytest.mark.usefixtures("recipe")
def test_everything_is_measured_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    import make_suite

    corpus(tmp_path / "test")
    words = ["make_suite.py", "set", "--test", "test", "--digits", "test/digits"]
    words += ["--prompts", "test/prompts", "--lags", "0.32"]
    monkeypatch.setattr(sys, "argv", words)
    make_suite.main()
    monkeypatch.setattr("moshi_cli.tasks.fidelity.missing", lambda: ["pesq", "visqol"])
    monkeypatch.setattr("moshi_cli.tasks.fidelity.versions", lambda names: {})
    monkeypatch.setitem(sys.modules, "pystoi", types.SimpleNamespace(stoi=lambda x, y, rate: 0.5))
    args = ["--batch-size", 2, "--judge", SPEC, "--set", "qa.tail-silence=0.5", "--json"]
    args += ["--set", "codec.num-codebooks=4"]  # the tiny codec has no more
    done = invoke("suite", "set/suite.yaml", *args)
    assert done.exit_code == 0, done.stderr
    found = {entry["name"]: entry for entry in json.loads(done.stdout)["entries"]}
    assert {name: " ".join(entry["shown"]) for name, entry in found.items()} == FIGURES
    contexts = {name: entry["result"]["context"] for name, entry in found.items()}
    judged = [name for name, context in contexts.items() if "judge" in context]
    assert judged == ["tts", "tts-open", "codec", "chat"]
    alone = [name for name, context in contexts.items() if context["batch_size"] == 1]
    assert alone == ["speed-asr", "speed-tts", "speed-chat"]
    assert found["chat"]["result"]["items"] == 2 and found["speed-tts"]["result"]["items"] == 1
    rows = [json.loads(line) for line in Path("set/chat.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["Say b.", "Say c."] and all(r["answer"] for r in rows)


@pytest.mark.usefixtures("recipe")
def test_the_picture_of_delays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    import delays

    for lag, wer in (("0.32", 0.5), ("0", 0.75), ("2.48", 0.25)):
        share = Figure(wer, wer - 0.1, wer + 0.1, "share", 9)
        figures = {"wer": share, "wer/open": share, "emission_delay": Figure(float(lag) - 0.5)}
        write_result(Result("asr", figures, [{"id": "a"}]), tmp_path / f"lag-{lag}")
    delays.main(tmp_path, tmp_path / "out.svg")
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == "all (9 clips) 75.0 % 50.0 % 25.0 %".split()
    assert told[1].startswith("open (9 clips)")
    assert told[2].split() == "written after -0.50 s -0.18 s 1.98 s".split()
