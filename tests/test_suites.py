"""Suites as data: what a file may say, what a goal means, which figures are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks.evaluation import Figure, Result
from moshi_cli.tasks.suites import Entry, Goal, Outcome, Suite, chosen, load, missed, summary

TWO = """
title: Two
entries:
- {name: meetings, task: asr, manifest: m.jsonl, goals: {wer: at most 5 %}, figures: wer/*}
- name: words
  task: pairs
  inputs: [a.jsonl]
  options: {by-sum: true}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_a_suite(tmp_path: Path) -> None:
    suite, document = load(written(tmp_path, TWO), ["asr.by=voice", "words.semantic=1"])
    assert suite.title == "Two" and [entry.name for entry in suite.entries] == ["meetings", "words"]
    first, second = suite.entries
    assert (first.manifest, first.inputs, first.figures) == (("m.jsonl",), (), ("wer/*",))
    assert first.options == {"by": "voice"}
    assert second.options == {"by-sum": True, "semantic": 1}
    assert document.place(("entries", "1", "options", "by-sum")).endswith("s.yaml:8")


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("- a", "not a mapping", "entries"),
        ("title: x", "there are no entries", "list"),
        ("entries: []", "s.yaml:1: there are no entries", ""),
        ("entries: [3]", "s.yaml:1: entries.0 must be a mapping", ""),
        (
            "entris: 3\nentries:\n- {name: a, task: asr, inputs: b}",
            ":1: unknown key 'entris'",
            "en",
        ),
        ("entries:\n- {name: a}", "s.yaml:2: entries.0 lacks 'task'", ""),
        ("entries:\n- name: a\n  task: as", "s.yaml:3: entries.0.task cannot be 'as'", "'asr'"),
        ("entries:\n- name: a\n  task: asr\n  input: x", ":4: unknown key 'entries.0.input'", "in"),
        ("entries:\n- {name: a, task: asr}", "s.yaml:2: a has neither inputs nor", ""),
        ("entries:\n- {name: a/b, task: asr, inputs: x}", "cannot be a folder's", "letters"),
        ("entries:\n- {name: .., task: asr, inputs: x}", "cannot be a folder's", ""),
        (
            "entries:\n- {name: a, task: asr, inputs: x}\n- {name: A, task: tts, inputs: x}",
            "s.yaml:3: the name 'A' is there twice",
            "",
        ),
        (
            "entries:\n- name: a\n  task: asr\n  inputs: x\n  goals:\n    cer: 0\n    wer: good",
            "s.yaml:7: 'good' is no goal",
            "at most",
        ),
        ("entries:\n- {name: a, task: asr, inputs: x, goals: {wer: }}", "has no goal", "figur"),
        ("entries:\n- {name: a, task: asr, inputs: {}}", "entries.0.inputs must be a list", ""),
        (
            "entries:\n- {name: a, task: asr, goals: [wer], inputs: x}",
            "goals must be a mapping",
            "",
        ),
    ],
)
def test_errors_name_the_line(text: str, said: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(written(tmp_path, text))
    assert said in str(caught.value) and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [("words", "not of the form"), ("words.=3", "not of the form"), ("lm.by=3", "no entry 'lm'")],
)
def test_settings_are_checked(setting: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        load(written(tmp_path, TWO), [setting])


def test_entries_are_chosen_by_name(tmp_path: Path) -> None:
    suite, _ = load(written(tmp_path, TWO))
    assert [e.name for e in chosen(suite, "w*").entries] == ["words"]
    assert chosen(suite, "words, meetings").entries == chosen(suite, None).entries == suite.entries
    with pytest.raises(UsageError, match="no entry 'word'") as caught:
        chosen(suite, "word")
    assert caught.value.hint == "did you mean 'words'?"


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ("at most 5 %", 0.05, 0.0501),
        ("≤ 5 points", -0.2, 0.06),
        ("<=0.05", 0.05, 0.051),
        ("< 0.5", 0.49, 0.5),
        ("at least 80%", 0.8, 0.79),
        ("≥ -3.5 dB", -3.5, -4),
        ("> 1e-3", 0.002, 0.001),
        ("0", 0, 1),
        ("100 %", 1, 0.999),
        ("= .5", 0.5, math.nan),
    ],
)
def test_goals(text: str, good: float, bad: float) -> None:
    goal = Goal.of(text)
    assert goal.met(good) and not goal.met(bad) and not goal.met(math.nan)


@pytest.mark.parametrize("text", ["", "good", "at most", "about 5 %", "5 % or so", "1.2.3", "5 ms"])
def test_what_is_no_goal(text: str) -> None:
    with pytest.raises(ValueError, match="is no goal"):
        Goal.of(text)


def outcome(**more: object) -> Outcome:
    figures = {"wer": Figure(0.1, 0.05, 0.2, "share", 9), "wer/a": Figure(0.2), "cer": Figure(0.01)}
    result = Result("asr", figures, [{"id": "x"}])
    return Outcome(Entry("test", "asr", ("x",), **more), result)  # type: ignore[arg-type]


def test_what_a_table_shows() -> None:
    assert [line.name for line in outcome().lines()] == ["wer"]  # of a task, unless it is said
    lines = outcome(goals={"wer": "< 5 %", "exact": "1"}, figures=("wer*", "cer")).lines()
    assert [(line.name, line.goal, line.met) for line in lines] == [
        ("wer", "< 5 %", False), ("exact", "1", False), ("wer/a", "", None), ("cer", "", None),
    ]  # fmt: skip
    assert lines[1].figure is None
    assert [line.name for line in missed([outcome(goals={"wer": "at most 10 %"})])] == []


def test_the_record_of_a_suite() -> None:
    bad = Outcome(Entry("gone", "lm", ("y",)), None, "no such file")
    told = summary(Suite("T"), Path("s.yaml"), [outcome(goals={"wer": "0"}), bad])
    told = json.loads(json.dumps(told))
    assert (told["type"], told["failed"], told["missed"]) == ("suite", ["gone"], ["test/wer"])
    first, second = told["entries"]
    assert first["goals"] == {"wer": {"goal": "0", "met": False}} and first["shown"] == ["wer"]
    assert first["result"]["figures"]["wer"]["value"] == 0.1
    assert second == {
        "name": "gone", "task": "lm", "error": "no such file", "goals": {}, "shown": [],
        "result": None,
    }  # fmt: skip
