"""`moshi eval` through the front door; a tiny random model is as bad as can be, reproducibly."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli import eval_trials
from moshi_cli.core import audio
from moshi_cli.core.config import ModelConfig
from moshi_cli.core.engine import Engine
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import EPAD, Text
from moshi_cli.core.weights import Model, save
from moshi_cli.inputs import Item
from moshi_cli.tasks.asr import transcribe
from moshi_cli.tasks.chat import Talking, TalkingOptions, answer_now, gather
from moshi_cli.tasks.evaluation import read_result
from moshi_cli.tasks.loop import Output, drive
from moshi_cli.tasks.metrics import WordErrors, word_errors
from moshi_cli.tasks.sound import Sound

Invoke = Callable[..., Any]
LENGTHS = {"a": 1.3, "b": 0.9, "c": 1.1}
SPEC = f"""command:{sys.executable} -c "print('go left')" {{input}}"""


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    lags = {"asr": 0.32, "tts": -0.32, "chat": 0.0}
    config = ModelConfig(mimi=tiny_mimi.config, lm=tiny_lm.config, lags=lags)
    return Model(tiny_mimi, tiny_lm, tiny_text, config, "tiny")


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run `moshi eval` in a folder with a model, three recordings and a manifest of them."""
    save(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for i, (name, seconds) in enumerate(LENGTHS.items()):
        g = torch.Generator().manual_seed(i)
        audio.write(f"{name}.wav", torch.randn(round(seconds * 24_000), generator=g) * 0.2)
    words = [["go", 0.1, 0.4], ["left", 0.5, 0.8]]
    manifest(*({"id": n, "path": f"{n}.wav", "words": words, "answer": "left"} for n in LENGTHS))

    def call(*args: object, **extra: Any) -> Any:
        return CliRunner().invoke(cli.app, ["eval", *map(str, args)], **extra)

    return call


def manifest(*rows: dict[str, Any], name: str = "m.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def figure(done: Any, name: str) -> float:
    return float(json.loads(done.stdout)["figures"][name]["value"])


# Speech to text -----------------------------------------------------------------------------------


def test_asr_counts_what_moshi_asr_writes(invoke: Invoke, model: Model) -> None:
    done = invoke("asr", "--manifest", "m.jsonl", "--batch-size", 2, "--json", "-o", "out")
    assert done.exit_code == 0, done.stderr
    heard = {name: transcribe(model, audio.read(f"{name}.wav")[0]) for name in LENGTHS}
    parts = [word_errors("go left", heard[name].text) for name in LENGTHS]
    total = sum(parts, WordErrors())
    assert figure(done, "wer") == pytest.approx(total.rate)
    assert figure(done, "wer_mean") == pytest.approx(sum(p.rate for p in parts) / 3)
    assert figure(done, "insertions") == total.insertions and figure(
        done, "audio"
    ) == pytest.approx(3.3)
    kept = read_result(Path("out"))
    assert [row["id"] for row in kept.items] == list(LENGTHS)
    row = kept.items[0]
    assert row["hypothesis"] == heard["a"].text and row["audio"] == "../a.wav"
    assert len(row["emitted_s"]) == len(row["hypothesis_words"]) == len(heard["a"].words)
    ends = [end for _, _, end in row["hypothesis_words"]]
    assert all(at >= end for at, end in zip(row["emitted_s"], ends, strict=True))


def test_a_record_tells_how_it_was_made(invoke: Invoke) -> None:
    told = json.loads(invoke("asr", "--manifest", "m.jsonl", "--limit", 2, "--json").stdout)
    assert (told["task"], told["items"], told["failed"]) == ("asr", 2, [])
    context = told["context"]
    assert context["normaliser"] == "moshi-en-3" and context["dtype"] == "float32"
    assert context["settings"]["delay_s"] == 0.32 and context["seed"] == 0
    assert context["machine"]["cores"] and context["packages"]["torch"]
    assert context.keys() >= {"version", "model", "device", "date", "batch_size"}
    assert told["figures"]["wer"]["low"] is not None


def test_a_table_for_people(invoke: Invoke) -> None:
    done = invoke("asr", "--manifest", "m.jsonl", "--limit", 1)
    lines = done.stdout.splitlines()
    assert lines[0] == "asr: model, 1 items, moshi-en-3"
    assert any(line.startswith("wer ") and "%" in line for line in lines)
    assert not list(Path().glob("*moshi-eval*"))


def test_references_lie_beside_the_sound(invoke: Invoke) -> None:
    Path("a.txt").write_text("go  left\n")
    Path("b.json").write_text('{"alignments": [["stop", [0.1, 0.5], "SPEAKER_MAIN"]]}')
    Path("c.txt").write_text("")
    done = invoke("asr", "a.wav", "b.wav", "c.wav", "--json")
    assert done.exit_code == 0, done.stderr
    assert figure(done, "reference_words") == 3 and figure(done, "words_in_silence") > 0


def test_broken_items_are_counted_and_named(invoke: Invoke) -> None:
    Path("broken.wav").write_bytes(b"RIFF")
    good = {"id": "good", "path": "a.wav", "text": "go"}
    bad = [{"id": "bad", "path": "broken.wav", "text": "go"}, {"id": "mute", "path": "b.wav"}]
    manifest(good, *bad, {"text": "no path"})
    done = invoke("asr", "--manifest", "m.jsonl", "-o", "out", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["failed"] == ["bad", "mute", "m.jsonl:4"]
    assert "mute: it is not known what is said in it" in done.stderr
    assert "3 of 4 items failed: bad, mute, m.jsonl:4" in done.stderr
    assert figure(done, "reference_words") == 1
    manifest(*bad)
    done = invoke("asr", "--manifest", "m.jsonl")
    assert done.exit_code == 1 and "2 of 2 items failed" in done.stderr


def test_groups_of_items(invoke: Invoke) -> None:
    rows = [{"path": f"{n}.wav", "text": "go", "kind": k} for n, k in zip("ab", "xy", strict=True)]
    manifest(*rows)
    args = ["asr", "--manifest", "m.jsonl", "--by", "kind", "--json", "--fail-above", "wer/x=99"]
    done = invoke(*args)
    assert done.exit_code == 0, done.stderr
    assert (figure(done, "wer/x") + figure(done, "wer/y")) / 2 == figure(done, "wer")


def test_gates(invoke: Invoke) -> None:
    args = ["asr", "--manifest", "m.jsonl", "--limit", 1]
    gates = ["--fail-above", "wer=0.5", "--fail-above", "audio=9", "--fail-below", "exact=0.9"]
    done = invoke(*args, *gates)
    assert done.exit_code == 1
    assert "above the limit 0.5" in done.stderr and "exact is 0, below" in done.stderr
    assert "audio is" not in done.stderr
    assert invoke(*args, "--fail-above", "wer=99").exit_code == 0
    done = invoke(*args, "--fail-above", "words_in_silence=0")
    assert done.exit_code == 1 and "words_in_silence was not measured" in done.stderr
    for gate, why in (("wre=1", "there is no figure 'wre'"), ("wer", "makes no sense")):
        done = invoke(*args, "--fail-above", gate)
        assert done.exit_code == 2 and why in done.stderr and not done.stdout


def test_a_stopped_run_goes_on(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["asr", "--manifest", "m.jsonl", "--json"]
    whole = json.loads(invoke(*args, "-o", "whole").stdout)
    complete = eval_trials.Transcription.complete

    def stop(self: Any) -> None:
        complete(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(eval_trials.Transcription, "complete", stop)
    done = invoke(*args, "-o", "out")
    assert done.exit_code == 130 and "1 of 3 items are done; --resume goes on" in done.stderr
    assert not Path("out/report.json").exists()
    with Path("out/items.jsonl").open("a") as rows:
        rows.write('{"id": "torn')
    monkeypatch.setattr(eval_trials.Transcription, "complete", complete)
    done = invoke(*args, "-o", "out", "--resume")
    assert done.exit_code == 0 and "2 ok, 1 skipped" in done.stderr
    again = json.loads(done.stdout)
    same = {n for n in whole["figures"] if n not in ("rtf", "first_word")}
    assert {n: again["figures"][n] for n in same} == {n: whole["figures"][n] for n in same}

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("all is known")

    monkeypatch.setattr(Engine, "step", never)
    done = invoke(*args, "-o", "out", "--resume", "--normalizer", "none")  # scored anew, not heard
    assert done.exit_code == 0 and json.loads(done.stdout)["context"]["normaliser"] == "none"


def test_other_settings_are_another_run(invoke: Invoke) -> None:
    args = ["asr", "--manifest", "m.jsonl", "-o", "out", "--limit", 1]
    assert invoke(*args).exit_code == 0
    done = invoke(*args, "--resume", "--temperature", "0.7")
    assert "1 ok;" in done.stderr
    assert "1 skipped" in invoke(*args, "--resume", "--temperature", "0.7").stderr
    assert invoke("asr", "a.wav", "--resume").exit_code == 2


def test_transcripts_of_others_are_scored_without_a_model(invoke: Invoke) -> None:
    words = [{"word": "go", "start": 0.1, "end": 0.4}]
    manifest(
        {"id": "a", "text": "Go left", "words": words}, {"id": "z", "text": ""}, name="h.jsonl"
    )
    done = invoke("asr", "--manifest", "m.jsonl", "--hyp", "h.jsonl", "--json", "-m", "none")
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert told["failed"] == ["b", "c", "z"] and told["context"]["transcripts"] == "h.jsonl"
    assert figure(done, "wer") == 0 and figure(done, "timestamp_f1") == pytest.approx(2 / 3)
    assert "b: h.jsonl has no transcript of it" in done.stderr
    assert "z: h.jsonl has a transcript of it, but there is no reference" in done.stderr


def test_other_weights_in_the_same_place_are_another_model(invoke: Invoke, model: Model) -> None:
    args = ["asr", "--manifest", "m.jsonl", "-o", "out", "--limit", 1, "--json"]
    first = json.loads(invoke(*args).stdout)["context"]["revision"]
    assert model.lm is not None
    next(model.lm.parameters()).data.mul_(1.5)
    save(model, Path("model"))
    done = invoke(*args, "--resume")
    assert "1 ok;" in done.stderr
    assert json.loads(done.stdout)["context"]["revision"] != first


# Text to speech -----------------------------------------------------------------------------------


def test_tts_is_judged(invoke: Invoke) -> None:
    Path("t.txt").write_text("go left\n\none two three\n")
    done = invoke("tts", "t.txt", "-o", "out", "--batch-size", 2, "--judge", SPEC, "--json")
    assert done.exit_code == 0, done.stderr
    assert figure(done, "wer") == pytest.approx(3 / 5) and figure(done, "length_ratio") == 4 / 5
    assert figure(done, "first_audio") > 0
    rows = read_result(Path("out")).items
    assert [row["reference"] for row in rows] == ["go left", "one two three"]
    for row in rows:
        assert audio.duration_s(Path("out") / row["audio"]) == pytest.approx(row["audio_s"])
    assert json.loads(done.stdout)["context"]["judge"]["judge"] == "command"


def test_what_was_heard_is_not_heard_again(invoke: Invoke) -> None:
    Path("t.txt").write_text("go left\n")
    args = ["tts", "t.txt", "-o", "out", "--json"]
    silent = invoke(*args)
    assert "wer" not in json.loads(silent.stdout)["figures"]
    log = f"{sys.executable} -c \"open('log', 'a').write('x'); print('go')\" {{input}}"
    for _ in range(2):
        done = invoke(*args, "--resume", "--judge", f"command:{log}")
        assert "1 skipped" in done.stderr and figure(done, "wer") == 0.5
    assert Path("log").read_text() == "x"
    assert figure(invoke(*args, "--resume", "--judge", SPEC), "wer") == 0  # someone else


def test_a_judge_that_fails_fails_the_item(invoke: Invoke) -> None:
    manifest({"id": "x", "text": "go", "path": "a.wav"}, {"id": "y", "text": ""}, name="t.jsonl")
    deaf = f"{sys.executable} -c \"import sys; sys.exit('deaf')\" {{input}}"
    done = invoke("tts", "--manifest", "t.jsonl", "--json", "--judge", f"command:{deaf}")
    assert done.exit_code == 1 and json.loads(done.stdout)["failed"] == ["x", "y"]
    assert "the judge failed (deaf)" in done.stderr and "y: there is nothing to say" in done.stderr


def test_lengths_are_compared_with_recordings(invoke: Invoke) -> None:
    manifest({"id": "x", "text": "go", "path": "a.wav"}, name="t.jsonl")
    done = invoke("tts", "--manifest", "t.jsonl", "--json")
    assert figure(done, "duration_ratio") == pytest.approx(figure(done, "audio") / 1.3)


# Codec --------------------------------------------------------------------------------------------


def test_codec_at_several_sizes(invoke: Invoke, model: Model) -> None:
    args = ["codec", "--manifest", "m.jsonl", "-n", "1,4", "--batch-size", 2, "--json"]
    args += ["--metrics", "sisdr,mel", "--judge", SPEC]
    done = invoke(*args, "-o", "out")
    assert done.exit_code == 0, done.stderr
    assert figure(done, "bitrate@1") == 50 and figure(done, "bitrate@4") == 200  # 4 bits each
    assert figure(done, "entropy_rate@4") <= 200 and 0 < figure(done, "usage_q1") <= 1
    assert figure(done, "original_wer") == figure(done, "wer_added@4") == 0
    codes = torch.cat([model.mimi.encode(audio.read(f"{n}.wav")[None])[0] for n in LENGTHS], 1)
    for q, row in enumerate(codes, 1):
        shares = torch.bincount(row, minlength=16).double() / codes.shape[1]
        entropy = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
        assert figure(done, f"entropy_q{q}") == pytest.approx(float(entropy))
    row = read_result(Path("out")).items[0]
    assert row["passes"].keys() == {"1", "4"} and len(row["passes"]["4"]["same"]) == 4
    for name in (row["audio"], row["passes"]["1"]["audio"], row["codes"]):
        assert (Path("out") / name).is_file()
    again = invoke(*args, "-o", "out", "--resume")
    assert "3 skipped" in again.stderr
    assert json.loads(again.stdout)["figures"] == json.loads(done.stdout)["figures"]


def test_codec_on_what_begins_later(invoke: Invoke, model: Model) -> None:
    args = ["codec", "--manifest", "m.jsonl", "--metrics", "mel", "--json"]
    done = invoke(*args, "--shift", "0.1")
    assert done.exit_code == 0, done.stderr
    same = frames = 0
    for name in LENGTHS:
        wav = audio.read(f"{name}.wav")[None]
        codes, later = (model.mimi.encode(x)[0, 0] for x in (wav, wav[..., 2400:]))
        same += int((codes[: len(later)] == later).sum())
        frames += len(later)
    assert figure(done, "stability_semantic") == pytest.approx(same / frames)
    assert figure(done, "stability_q1") == figure(done, "stability_semantic")
    assert json.loads(done.stdout)["context"]["settings"]["shift_s"] == 0.1
    without = json.loads(invoke(*args, "--shift", 0).stdout)["figures"]
    assert "idempotence_semantic" in without and not any(n.startswith("stab") for n in without)


def test_codec_without_words(invoke: Invoke) -> None:
    done = invoke("codec", "a.wav", "--metrics", "mel", "--json", "--fail-below", "idempotence=0")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["figures"]
    assert "idempotence_q4" in found and "wer_added" not in found and "si_sdr_db" not in found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-n", "5"], "5 codebooks are asked for, the codec has 4"),
        (["-n", "0,2"], "--num-codebooks 0,2 makes no sense"),
        (["--metrics", "mos"], "unknown measure 'mos'"),
        (["--channel", "separate"], "an evaluation hears one channel"),
        (["--fail-above", "wer@2=1"], "there is no figure 'wer@2'"),
    ],
)
def test_codec_usage(invoke: Invoke, args: list[str], message: str) -> None:
    done = invoke("codec", "a.wav", *args)
    assert done.exit_code == 2 and message in done.stderr and not done.stdout


# Spoken questions ---------------------------------------------------------------------------------


def test_answers_are_those_of_moshi_chat(invoke: Invoke, model: Model) -> None:
    args = ["qa", "--manifest", "m.jsonl", "--tail-silence", "0.5", "--json", "-o", "out"]
    done = invoke(*args, "--judge", SPEC, "--batch-size", 2)
    assert done.exit_code == 0, done.stderr
    assert figure(done, "written_exact") == 0 and figure(done, "heard_holds") == 1
    row = read_result(Path("out")).items[1]
    assert row["written"] == replied(model, "b", None) and row["question"] == "go left"
    assert audio.duration_s(Path("out") / row["audio"]) == pytest.approx(0.9 + 0.5)
    assert figure(done, "audio") == pytest.approx(3.3 + 3 * 0.5)


def replied(model: Model, name: str, prompt: torch.Tensor | None) -> str:
    frames = 0 if prompt is None else prompt.shape[1]
    engine = Engine(model, model.fit(eval_chat()), 1, prompt_frames=frames)
    sound = Sound(audio.read(f"{name}.wav")[0])
    talking = Talking(
        model, engine.task, sound, seed=Item(name, None, "").seed(0),
        options=TalkingOptions(tail_s=0.5), prompt=prompt,
    )  # fmt: skip
    return gather(event for _, event in drive(engine, [talking])).text


def eval_chat() -> Any:
    from moshi_cli.tasks.chat import CHAT

    return CHAT


def test_a_word_is_forced_when_the_question_is_over(
    invoke: Invoke, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[int] = []
    take = Talking.take

    def spy(self: Talking, output: Output) -> Any:
        texts.append(output.text)
        return take(self, output)

    monkeypatch.setattr(Talking, "take", spy)
    args = ["qa", "b.wav", "--tail-silence", "0.5", "--json"]
    Path("b.json").write_text("{}")
    manifest({"id": "b", "path": "b.wav", "answer": ["left"]}, name="q.jsonl")
    Path("b.json").unlink()
    args = ["qa", "--manifest", "q.jsonl", "--tail-silence", "0.5", "-o", "out"]
    assert invoke(*args).exit_code == 0
    free, at = list(texts), 12  # 0.9 s are 11.25 frames: the first silent one is number 12
    texts.clear()
    done = invoke(*args, "--answer-now")
    assert done.exit_code == 0, done.stderr
    assert texts[:at] == free[:at] and texts[at] == EPAD != free[at]
    row = read_result(Path("out")).items[0]
    assert row["written"] == replied(model, "b", answer_now(model, at))


def test_questions_without_answers_fail(invoke: Invoke) -> None:
    done = invoke("qa", "a.wav")
    assert done.exit_code == 1 and "a.wav: the answer is not known" in done.stderr
