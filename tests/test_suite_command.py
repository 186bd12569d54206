"""`moshi eval suite` through the front door: the same as its commands one by one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_eval_command import SPEC, Invoke, invoke, manifest, model
from test_report import Page

from moshi_cli import eval_trials

__all__ = ["invoke", "model"]  # fixtures

SUITE = """
title: Of everything
entries:
- name: words
  task: asr
  manifest: m.jsonl
  options: {by: kind, batch_size: 2}
  goals: {wer: 0, exact: ≥ 0}
  figures: [cer, wer/*]
- {name: spoken, task: tts, inputs: t.txt}
- {name: unheard, task: tts, inputs: t.txt, options: {judge: none}}
- {name: codes, task: codec, inputs: [a.wav, "b*.wav"], options: {n: [1, 4], metrics: [mel]}}
- {name: answers, task: qa, manifest: [m.jsonl], options: {tail-silence: 0.5, answer-now: false}}
- {name: order, task: pairs, inputs: p.jsonl, options: {by-length: false}, goals: {accuracy: 2}}
"""
SUITE = SUITE.replace("{n: ", "{num-codebooks: ")


@pytest.fixture
def files(invoke: Invoke) -> None:
    """A suite in a folder of its own, with what it names."""
    Path("sub").mkdir()
    for name in "abc":
        Path(f"{name}.wav").rename(f"sub/{name}.wav")
    Path("m.jsonl").rename("sub/m.jsonl")
    Path("sub/t.txt").write_text("go left\n")
    manifest({"id": "x", "good": "hello sky", "bad": "sky hello"}, name="sub/p.jsonl")
    Path("sub/s.yaml").write_text(SUITE, encoding="utf-8")


pytestmark = pytest.mark.usefixtures("files")


def told(done: Any) -> dict[str, Any]:
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def steady(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures without those of the clock."""
    return {n: f for n, f in figures.items() if n not in ("rtf", "first_word", "first_audio")}


def test_a_suite_is_its_commands_one_by_one(invoke: Invoke) -> None:
    args = ["suite", "sub/s.yaml", "-o", "out", "--judge", SPEC, "--limit", 2]
    done = invoke(*args, "--json", "--html", "page.html")
    assert done.exit_code == 0, done.stderr
    record = told(done)
    assert (record["failed"], record["missed"]) == ([], ["words/wer", "order/accuracy"])
    found = {entry["name"]: entry["result"] for entry in record["entries"]}
    alone = {
        "words": ["asr", "--manifest", "sub/m.jsonl", "--by", "kind"],
        "spoken": ["tts", "sub/t.txt", "--judge", SPEC],
        "unheard": ["tts", "sub/t.txt"],
        "codes": ["codec", "sub/a.wav", "sub/b.wav", "-n", "1,4", "--metrics", "mel"],
        "answers": [
            "qa", "--manifest", "sub/m.jsonl", "--tail-silence", "0.5", "--judge", SPEC,
        ],
        "order": ["pairs", "sub/p.jsonl", "--by-sum"],
    }  # fmt: skip
    assert found.keys() == alone.keys()
    for name, words in alone.items():
        one = told(invoke(*words, "--limit", 2, "--json"))
        assert steady(found[name]["figures"]) == steady(one["figures"]), name
    assert found["words"]["context"]["batch_size"] == 2 != found["codes"]["context"]["batch_size"]
    assert json.loads(Path("out/suite.json").read_text()) == record
    page = Page(Path("page.html"))
    assert page.count("section") == 6 and [e.text for e in page.of("h1")] == ["Of everything"]
    (table,) = page.of("table", class_="suite")
    assert "wordswer" in table.text and "missed" in table.text and "order" in table.text
    again = invoke("report", "out", "--html", "again.html")
    assert again.exit_code == 0, again.stderr
    assert [e.text for e in Page(Path("again.html")).of("table", class_="suite")] == [table.text]


def test_a_table_for_people(invoke: Invoke) -> None:
    done = invoke("suite", "sub/s.yaml", "--only", "words", "--only", "o*", "--limit", 1)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "words – asr: model, 1 items, moshi-en-3"
    assert lines[1].startswith("  wer ") and lines[1].endswith("n=1    goal 0: missed")
    assert lines[2].startswith("  exact ") and lines[2].endswith("goal ≥ 0: met")
    assert lines[3].startswith("  cer ") and lines[4].startswith("order – pairs")
    assert "goals missed: words/wer, order/accuracy" in done.stderr
    assert not list(Path().glob("*moshi-eval*"))
    strict = invoke("suite", "sub/s.yaml", "--only", "words", "--limit", 1, "--strict")
    assert strict.exit_code == 1


def test_failures_are_counted_and_named(invoke: Invoke) -> None:
    Path("sub/bad.jsonl").write_text(Path("sub/m.jsonl").read_text() + '{"path": "gone.wav"}\n')
    text = "entries:\n" + "".join(
        f"- {{name: {name}, task: asr, manifest: {name}.jsonl}}\n" for name in ("gone", "bad", "m")
    )
    Path("sub/f.yaml").write_text(text)
    done = invoke("suite", "sub/f.yaml", "--json", "--html", "page.html")
    assert done.exit_code == 3
    assert (
        told(done)["failed"] == ["gone"] and "is no data set" in told(done)["entries"][0]["error"]
    )
    assert "1 of 3 entries failed: gone" in done.stderr and "items failed of bad" in done.stderr
    assert "is no data set" in Page(Path("page.html")).of("table", class_="suite")[0].text
    done = invoke("suite", "sub/f.yaml", "-m", "nowhere")
    assert done.exit_code == 1 and "3 of 3 entries failed" in done.stderr  # for different reasons
    done = invoke("suite", "sub/f.yaml", "-m", "nowhere", "--only", "m,bad", "--json")
    assert done.exit_code == 4 and told(done)["failed"] == ["bad", "m"]


def test_gates_name_their_entry(invoke: Invoke) -> None:
    args = ["suite", "sub/s.yaml", "--only", "words", "--limit", 1]
    assert invoke(*args, "--fail-above", "words/wer=99").exit_code == 0
    done = invoke(*args, "--fail-above", "words/wer=0.5", "--fail-below", "words/exact=0")
    assert done.exit_code == 1 and "above the limit 0.5" in done.stderr
    for gate, why in (
        ("wer=1", "makes no sense"),
        ("codes/wer=1", "no entry 'codes'"),
        ("words/wre=1", "there is no figure 'wre'"),
        ("words/wer=x", "makes no sense"),
    ):
        done = invoke(*args, "--fail-above", gate)
        assert done.exit_code == 2 and why in done.stderr and not done.stdout


def test_a_stopped_suite_goes_on(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["suite", "sub/s.yaml", "--only", "words,order", "-o", "out", "--json"]
    whole = told(invoke(*args))
    complete = eval_trials.Transcription.complete

    def stop(self: Any) -> None:
        complete(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(eval_trials.Transcription, "complete", stop)
    done = invoke(*args)
    assert done.exit_code == 130 and not done.stdout
    assert "0 of 2 entries are done; --resume goes on" in done.stderr
    monkeypatch.setattr(eval_trials.Transcription, "complete", complete)
    done = invoke(*args, "--resume")
    assert done.exit_code == 0 and "skipped" in done.stderr
    for before, after in zip(whole["entries"], told(done)["entries"], strict=True):
        assert steady(after["result"]["figures"]) == steady(before["result"]["figures"])
    assert invoke("suite", "sub/s.yaml", "--resume").exit_code == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("task: asr, inputs: x, options: {bye: kind}", "s.yaml:2: `moshi eval asr` has no option"),
        ("task: asr, inputs: x, options: {resume: true}", "has no option 'resume'"),
        ("task: asr, inputs: x, options: {quiet: true}", "has no option 'quiet'"),
        ("task: asr, inputs: x, options: {manifest: m}", "has no option 'manifest'"),
        ("task: asr, inputs: x, options: {by: colour}", "'colour' is not one of kind, voice"),
        ("task: asr, inputs: x, options: {collar: -1}", "s.yaml:2: invalid value for '--collar'"),
        ("task: asr, inputs: x, options: {collar: {a: 1}}", "collar must be one value"),
        ("task: asr, inputs: x, options: {recursive: 1}", "recursive must be true or false"),
        ("task: asr, inputs: x, goals: {wre: 0}", "s.yaml:2: asr has no figure 'wre'"),
        ("task: codec, inputs: x, figures: [mel]", "codec has no figure 'mel'"),
        ("task: lm, manifest: x", "`moshi eval lm` takes `inputs`, no manifest"),
        ("task: dialogue, manifest: [x, y]", "`moshi eval dialogue` takes one manifest"),
    ],
)
def test_what_an_entry_cannot_say(invoke: Invoke, entry: str, said: str) -> None:
    """All of it is found before anything is run."""
    good = "\n- {name: b, task: asr, manifest: sub/m.jsonl}"
    Path("s.yaml").write_text(f"entries:\n- {{name: a, {entry}}}{good}")
    done = invoke("suite", "s.yaml")
    assert done.exit_code == 2 and said in done.stderr and not done.stdout
    assert done.stderr.count("\n") <= 2 and "eval asr:" not in done.stderr


def test_an_option_from_outside(invoke: Invoke) -> None:
    done = invoke("suite", "sub/s.yaml", "--only", "words", "--set", "words.by=", "--json")
    assert done.exit_code == 0, done.stderr
    done = invoke("suite", "sub/s.yaml", "--only", "words", "--set", "asr.limit=1", "--json")
    assert told(done)["entries"][0]["result"]["items"] == 1


def test_the_suite_of_the_examples(invoke: Invoke, root: Path) -> None:
    args = ["--set", "codec.num-codebooks=4", "--set", "codec.metrics=mel", "--json"]
    done = invoke("suite", root / "examples/evaluate/suite.yaml", *args)
    assert done.exit_code == 0, done.stderr
    assert [entry["task"] for entry in told(done)["entries"]] == [
        "asr", "tts", "codec", "qa", "lm", "pairs",
    ]  # fmt: skip
