"""Figures of every task from rows made by hand, jiwer's own examples among them."""

from __future__ import annotations

from typing import Any

import pytest

from moshi_cli.core.errors import UsageError
from moshi_cli.tasks import scoring
from moshi_cli.tasks.normalisers import normaliser

NONE = normaliser("none")


def asr(*pairs: tuple[str, str], **more: Any) -> dict[str, float]:
    rows = [{"id": str(i), "reference": r, "hypothesis": h} for i, (r, h) in enumerate(pairs)]
    return {name: figure.value for name, figure in scoring.asr(rows, **more).items()}


def test_the_examples_of_jiwer() -> None:
    found = asr(("hello world", "hello duck"), normaliser=NONE)
    assert found["wer"] == 0.5 and found["cer"] == pytest.approx(5 / 11)
    assert found["substitutions"] == found["hits"] == 1
    found = asr(("hello world", "hello duck"), ("i like monthy python", "i like python"))
    assert found["wer"] == pytest.approx(2 / 6)  # of the corpus
    assert found["wer_mean"] == pytest.approx((1 / 2 + 1 / 4) / 2)  # of the utterances
    assert (found["deletions"], found["insertions"], found["reference_words"]) == (1, 0, 6)


def test_empty_references_and_transcripts() -> None:
    found = asr(("", ""), ("", "thank you"), ("go left", ""), ("stop", "stop"))
    assert found["wer"] == pytest.approx((2 + 2) / 3) and found["wer_mean"] == 0.5
    assert found["words_in_silence"] == 2 and found["empty_transcripts"] == 1
    assert found["exact"] == 0.5


def test_silence_alone_has_a_rate() -> None:
    assert asr(("", ""))["wer"] == 0 and asr(("", "you"))["wer"] == 1
    assert asr(("…", "Hm"))["words_in_silence"] == 1  # nothing is left of the reference
    assert "words_in_silence" not in asr(("go", "go"))
    assert scoring.asr([]) == {}


def test_the_normaliser_decides() -> None:
    pair = ("Go left, Anna!", "go left anna")
    assert asr(pair)["wer"] == 0 and asr(pair, normaliser=NONE)["wer"] == 1


def test_whispers_normaliser_on_its_own_examples() -> None:
    pytest.importorskip("whisper_normalizer")
    whisper = normaliser("whisper-en")
    assert whisper.name.startswith("whisper-en-0.")
    assert whisper.write("Let's", None) == "let us"
    assert whisper.write("twenty twenty-one", None) == "2021"
    assert asr(("the 1960s", "the nineteen sixties"), normaliser=whisper)["wer"] == 0


def test_a_normaliser_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(UsageError, match="needs the package whisper-normalizer"):
        normaliser("whisper-en")
    with pytest.raises(UsageError, match="unknown normaliser 'basic'"):
        normaliser("basic")


def test_times_and_delays_of_words() -> None:
    row = {
        "reference": "go left", "hypothesis": "go left", "audio_s": 2.0, "seconds": 0.5,
        "reference_words": [["go", 0.0, 0.4], ["left", 0.5, 1.0]],
        "hypothesis_words": [["go", 0.0, 0.4], ["left", 0.5, 1.5]], "emitted_s": [0.8, 2.0],
        "first_s": 0.3,
    }  # fmt: skip
    plain = {"reference": "a", "hypothesis": "a", "audio_s": 2.0, "seconds": 1.5, "first_s": None}
    found = {n: f.value for n, f in scoring.asr([row, plain]).items()}
    assert found["timestamp_f1"] == 0.5 and found["timestamp_miou"] == 0.75
    assert found["emission_delay"] == pytest.approx((0.4 + 1.0) / 2)
    assert (found["rtf"], found["audio"], found["first_word"]) == (0.5, 4.0, 0.3)


def test_speech_by_its_judge_and_its_length() -> None:
    rows = [
        {"reference": "go left now", "hypothesis": "go left", "audio_s": 1.0, "reference_s": 2.0,
         "seconds": 0.5, "first_s": 0.2, "unspoken": ["now"]},
        {"reference": "stop", "hypothesis": "stop it please", "audio_s": 1.0, "first_s": 0.4,
         "seconds": 0.5, "unspoken": []},
    ]  # fmt: skip
    found = {n: f.value for n, f in scoring.tts(rows).items()}
    assert found["wer"] == pytest.approx(3 / 4) and found["length_ratio"] == 5 / 4
    assert found["duration_ratio"] == 0.5 and found["unspoken_words"] == 1
    assert found["first_audio"] == pytest.approx(0.3) and found["rtf"] == 0.5
    unheard = scoring.tts([{k: v for k, v in r.items() if k != "hypothesis"} for r in rows])
    assert unheard.keys() & {"wer", "length_ratio", "substitutions"} == set()


def test_answers_in_writing_and_to_the_ear() -> None:
    def row(written: str, heard: str | None, *answers: str) -> dict[str, Any]:
        said = {} if heard is None else {"heard_reply": heard}
        return {"question": "Where to?", "answers": list(answers), "written": written, **said}

    rows = [
        row("Go left.", "go left", "go left"),
        row("go right", "um go right", "go right", "to the right"),
        row("", "", "stop"),
    ]
    found = {n: f.value for n, f in scoring.qa(rows).items()}
    assert found["written_exact"] == pytest.approx(2 / 3)
    assert found["heard_holds"] == pytest.approx(2 / 3)
    assert found["heard_right"] == found["both"] == pytest.approx(1 / 3)  # "um": 1 of 2 words
    assert found["silent_replies"] == pytest.approx(1 / 3)
    assert found["heard_wer"] == pytest.approx((0 + 1 + 1) / (2 + 2 + 1))
    alone = scoring.qa([row("go left", None, "go left")])
    assert "both" not in alone and alone["written_right"].value == 1


def test_a_codec_by_its_passes() -> None:
    def row(sdr: float | None, same: list[int], before: str, after: str) -> dict[str, Any]:
        passes = {
            "1": {"si_sdr_db": 0.0, "same": same[:1], "frames": 10},
            "2": {"si_sdr_db": sdr, "same": same, "frames": 10},
        }
        heard = {"original": before, "1": "", "2": after}
        return {"reference": "go left", "passes": passes, "heard": heard}

    rows = [row(6.0, [10, 5], "go left", "go left"), row(None, [6, 1], "go lift", "oh lift")]
    found = {n: f.value for n, f in scoring.codec(rows, [1, 2]).items()}
    assert found["si_sdr_db@2"] == 6.0 and found["si_sdr_db@1"] == 0.0
    assert found["idempotence_q1@2"] == 0.8 and found["idempotence_q2@2"] == pytest.approx(0.3)
    assert found["idempotence@2"] == pytest.approx(22 / 40) and found["idempotence@1"] == 0.8
    assert found["original_wer"] == 0.25 and found["wer@2"] == 0.5
    assert found["wer_added@2"] == 0.25 and found["wer_added@1"] == 0.75
    single = scoring.codec(rows[:1], [2])
    assert single["wer_added"].value == 0 and single["wer_added"].low is None


def test_pairs_without_codes() -> None:
    heard = [("go left", "go"), ("go left", "go left")]
    rows: list[dict[str, Any]] = [
        {"reference": "go left", "passes": {"other": {"si_sdr_db": x, "stoi": None}},
         "heard": {"original": before, "other": after}}
        for x, (before, after) in zip((4.0, 8.0), heard, strict=True)
    ]  # fmt: skip
    found = {n: f.value for n, f in scoring.compared(rows, "other").items()}
    assert found["si_sdr_db"] == 6 and found["original_wer"] == 0
    assert found["wer"] == found["wer_added"] == 0.25
    assert not any(name.startswith(("idem", "stab", "stoi")) for name in found)


def test_codes_that_stay_the_same() -> None:
    def row(again: list[int], later: list[int] | None) -> dict[str, Any]:
        found = {"passes": {"3": {"same": again, "frames": 10}}}
        return found | ({} if later is None else {"later": {"same": later, "frames": 8}})

    rows = [row([10, 5, 3], [8, 4, 0]), row([6, 1, 0], [4, 0, 0]), row([0, 0, 0], None)]
    found = {n: f.value for n, f in scoring.codec(rows, [3]).items()}
    assert found["idempotence"] == pytest.approx(25 / 90)
    assert found["idempotence_semantic"] == found["idempotence_q1"] == pytest.approx(16 / 30)
    assert found["stability"] == pytest.approx(16 / 48)  # of two recordings: the third is too short
    assert found["stability_semantic"] == found["stability_q1"] == 0.75
    assert (found["stability_q2"], found["stability_q3"]) == (0.25, 0)
    two = {n: f.value for n, f in scoring.codec(rows, [3], semantic=2).items()}
    assert two["stability_semantic"] == 0.5 and two["idempotence_semantic"] == pytest.approx(
        22 / 60
    )
    first = scoring.codec(
        [{**r, "passes": {"1": r["passes"]["3"], **r["passes"]}} for r in rows], [1, 3]
    )
    assert first["stability@1"].value == 0.75 and first["stability@3"].value == found["stability"]
    assert "stability_q1" in first and "stability_q1@1" not in first
    assert "stability" not in scoring.codec(rows[2:], [3])


def test_groups_have_figures_of_their_own() -> None:
    rows = [
        {"kind": "list", "reference": "go left", "hypothesis": "go"},
        {"kind": "list", "reference": "stop it", "hypothesis": "stop it"},
        {"reference": "go", "hypothesis": ""},
    ]
    found = scoring.grouped(scoring.asr, rows, "kind")
    assert found["wer/list"].value == 0.25 and found["wer"].value == 0.4
    assert found["exact/list"].count == 2 and "cer/list" not in found
    assert scoring.grouped(scoring.asr, rows, None).keys() == scoring.asr(rows).keys()


def test_answers_of_other_groups_count() -> None:
    def row(kind: str, answer: str, written: str) -> dict[str, Any]:
        answers = [f"two plus two plus {answer}"]
        return {"kind": kind, "question": "", "answers": answers, "written": written}

    rows = [row("a", "four", "two plus two plus five"), row("b", "five", "")]
    every = scoring.answers_of(rows)
    found = scoring.grouped(lambda r: scoring.qa(r, answers=every), rows, "kind")
    assert found["written_exact/a"].value == 0 == rows[0]["written_right"]
