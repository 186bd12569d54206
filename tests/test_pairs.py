"""Suites of pairs: what a line may be, and who wins."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import TINY_LM

from moshi_cli.core import audio
from moshi_cli.core.errors import InputError, ModelError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import LmWeights, lm_loss
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.tasks.pair_suites import Pair, Side, read_suite
from moshi_cli.tasks.pairs import Judge, Score, right


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_of_a_suite(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl",
        {"id": "a", "good": "the sky", "bad": "sky the", "group": "order"},
        {"good": "good.wav", "bad": {"path": "sub/bad"}},
        {"id": "c", "good": {"text": "play it.wav"}, "bad": "x"},
    )
    assert read_suite(path) == [
        Pair("a", Side(text="the sky"), Side(text="sky the"), "order"),
        Pair("2", Side(path=tmp_path / "good.wav"), Side(path=tmp_path / "sub/bad")),
        Pair("c", Side(text="play it.wav"), Side(text="x")),
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"good": "a"}, "s.jsonl:1: not a pair.*bad"),
        ({"good": "a", "bad": " "}, "empty side"),
        ({"good": {"text": "a", "path": "b"}, "bad": "b"}, "a path or a text"),
        ([1], "not a pair"),
    ],
)
def test_broken_lines_are_told(tmp_path: Path, row: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_suite(write(tmp_path / "s.jsonl", row))


def test_ids_are_told_apart_and_empty_suites_refused(tmp_path: Path) -> None:
    row = {"id": "a", "good": "x", "bad": "y"}
    with pytest.raises(InputError, match="twice"):
        read_suite(write(tmp_path / "s.jsonl", row, row))
    with pytest.raises(InputError, match="no pairs"):
        read_suite(write(tmp_path / "s.jsonl"))
    with pytest.raises(InputError, match="cannot read"):
        read_suite(tmp_path / "gone.jsonl")


def test_a_gold_file_is_a_suite(tmp_path: Path) -> None:
    gold = tmp_path / "gold.csv"
    gold.write_text(
        "id,filename,voice,type,subtype,transcription,correct\n"
        "1,aa,A,agreement,x,the dogs bark,1\n1,bb,A,agreement,x,the dogs barks,0\n"
        "1,cc.wav,B,agreement,x,the dogs barks,0\n1,dd,B,agreement,x,the dogs bark,1\n"
    )
    assert read_suite(tmp_path) == [
        Pair("1/A", Side(tmp_path / "aa.wav"), Side(tmp_path / "bb.wav"), "agreement"),
        Pair("1/B", Side(tmp_path / "dd.wav"), Side(tmp_path / "cc.wav"), "agreement"),
    ]
    gold.write_text("id,filename,voice,correct\n1,a,A,1\n")
    with pytest.raises(InputError, match="one side"):
        read_suite(gold)
    gold.write_text("id,filename,voice,correct\n1,a,A,1\n1,b,A,1\n")
    with pytest.raises(InputError, match=r"gold.csv:3.*two sides"):
        read_suite(gold)
    gold.write_text("id,filename,voice\n1,a,A\n")
    with pytest.raises(InputError, match=r"gold.csv:2: not a row"):
        read_suite(gold)


def test_words_have_groups_by_frequency(tmp_path: Path) -> None:
    """The columns of sWUGGY; what is no word has no frequency."""
    (tmp_path / "gold.csv").write_text(
        "filename,id,voice,frequency,word,phones,length,correct\n"
        "a,1,A,12,brick,B R IH K,4,1\nb,1,A,,blick,B L IH K,4,0\n"
        "c,2,A,0,squalled,S K,4,1\nd,2,A,,squilled,S K,4,0\n"
    )
    assert [(pair.id, pair.group) for pair in read_suite(tmp_path)] == [
        ("1/A", "in_vocabulary"), ("2/A", "oov"),
    ]  # fmt: skip


def test_ids_of_other_phenomena_are_other_pairs(tmp_path: Path) -> None:
    rows = [
        f"{kind}{c},1,A,{kind},{sub},x,{c}"
        for kind, sub in (("islands", "p"), ("islands", "q"), ("npi", "p")) for c in (1, 0)
    ]  # fmt: skip
    head = "filename,id,voice,type,subtype,transcription,correct\n"
    (tmp_path / "gold.csv").write_text(head + "\n".join(rows))
    found = read_suite(tmp_path)
    assert [pair.id for pair in found] == ["islands/p/1/A", "islands/q/1/A", "npi/p/1/A"]
    assert [pair.group for pair in found] == ["islands", "islands", "npi"]


def test_recordings_are_paired_by_their_names(tmp_path: Path) -> None:
    names = ["0_ab-c_correct", "1_ab-c_incorrect", "2_xy_correct", "3_xy_incorrect"]
    names += ["10_xy_correct", "11_xy_incorrect", "7_correct", "7_incorrect"]
    for name in names:
        (tmp_path / f"{name}.wav").touch()
    (tmp_path / "readme_correct.txt").touch()
    assert read_suite(tmp_path) == [
        Pair(
            "ab-c", Side(tmp_path / "0_ab-c_correct.wav"), Side(tmp_path / "1_ab-c_incorrect.wav")
        ),
        Pair("xy~1", Side(tmp_path / "2_xy_correct.wav"), Side(tmp_path / "3_xy_incorrect.wav")),
        Pair("xy~2", Side(tmp_path / "10_xy_correct.wav"), Side(tmp_path / "11_xy_incorrect.wav")),
        Pair("7", Side(tmp_path / "7_correct.wav"), Side(tmp_path / "7_incorrect.wav")),
    ]
    (tmp_path / "8_correct.wav").touch()
    with pytest.raises(InputError, match="8 has 1 right and 0 wrong sides"):
        read_suite(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither a gold\.csv nor recordings"):
        read_suite(tmp_path / "empty")


SENTENCES = ("One.", "Two, really.", "Three.", "Four.")
STORY = {f"InputSentence{i}": text for i, text in enumerate(SENTENCES, 1)}
ENDINGS = {"RandomFifthSentenceQuiz1": "Five.", "RandomFifthSentenceQuiz2": "Nine."}


def test_stories_with_two_endings(tmp_path: Path) -> None:
    path = tmp_path / "cloze.csv"
    row = {"InputStoryid": "s", **STORY, **ENDINGS, "AnswerRightEnding": "2"}
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerow(row)
    start = " ".join(SENTENCES)
    assert read_suite(path) == [Pair("s", Side(text=f"{start} Nine."), Side(text=f"{start} Five."))]
    other = {f"input_sentence_{i}": text for i, text in enumerate(SENTENCES, 1)}
    other |= {"sentence_quiz1": "Five.", "sentence_quiz2": "Nine.", "answer_right_ending": 1}
    good, bad = Side(text=f"{start} Five."), Side(text=f"{start} Nine.")
    assert read_suite(write(tmp_path / "s.jsonl", other)) == [Pair("1", good, bad)]
    path.write_text(path.read_text("utf-8-sig").replace(",2", ",3"))
    with pytest.raises(InputError, match=r"cloze\.csv:2: not a story .*AnswerRightEnding is 3"):
        read_suite(path)


def uniform(lm: MoshiLm) -> MoshiLm:
    """A model that finds every token as likely."""
    assert lm.depth is not None
    for weight in (lm.text_linear.weight, lm.depth.heads.weight):
        torch.nn.init.zeros_(weight)
    return lm


def test_scores_by_hand(tmp_path: Path, tiny_lm: MoshiLm, tiny_text: Text, tiny_mimi: Mimi) -> None:
    audio.write(tmp_path / "a.wav", torch.rand(1, 5 * 1920) - 0.5)
    judge = Judge(uniform(tiny_lm), tiny_text, tiny_mimi, LmWeights(semantic=10, acoustic=2))
    tokens = len(tiny_text.encode("hello sky"))
    sides = [Side(tmp_path / "a.wav"), Side(text="hello sky")]
    sound, text = judge.scores([judge.batch(side) for side in sides])
    assert sound.mass == 5 * (10 + 3 * 2)  # five frames; one semantic, three acoustic codebooks
    assert sound.loglik == pytest.approx(-sound.mass * math.log(16), rel=1e-6)
    assert text.mass == tokens + 1  # and the end
    assert text.loglik == pytest.approx(-(tokens + 1) * math.log(288), rel=1e-6)
    assert sound.value(by_length=True) == pytest.approx(-math.log(16), rel=1e-6)


def test_right_is_likelier_and_equal_is_half() -> None:
    long, short = Score(-6.0, 4.0), Score(-4.0, 2.0)  # 1.5 and 2 nats a token
    assert (right(long, short, by_length=False), right(long, short, by_length=True)) == (0, 1)
    assert right(short, long, by_length=False) == 1
    assert right(long, long, by_length=True) == 0.5


def test_a_model_prefers_what_it_has_learnt(
    tiny_lm: MoshiLm, tiny_text: Text, tiny_mimi: Mimi
) -> None:
    judge = Judge(tiny_lm, tiny_text, tiny_mimi)
    good, bad = judge.batch(Side(text="hello sky two")), judge.batch(Side(text="two hello sky"))
    tiny_lm.requires_grad_(True)
    for _ in range(20):
        lm_loss(tiny_lm, good.shifted, conditions=tiny_lm.condition([{}])).total.backward()
        for p in tiny_lm.parameters():
            if p.grad is not None:
                p.data -= 0.1 * p.grad
                p.grad = None
    assert right(*judge.scores([good, bad]), by_length=True) == 1
    alone = [judge.scores([side])[0] for side in (good, bad)]
    assert judge.scores([bad, good])[0].loglik == pytest.approx(alone[1].loglik, rel=1e-5)


def test_what_cannot_be_scored(
    tmp_path: Path, tiny_lm: MoshiLm, tiny_text: Text, tiny_mimi: Mimi
) -> None:
    judge = Judge(tiny_lm, tiny_text, tiny_mimi)
    with pytest.raises(InputError):
        judge.batch(Side(path=tmp_path / "gone.wav"))
    soundfile.write(tmp_path / "empty.wav", [], 24_000)
    with pytest.raises(InputError, match="empty"):
        judge.batch(Side(path=tmp_path / "empty.wav"))
    deaf = MoshiLm(replace(TINY_LM, depth=None, dep_q=0)).eval()
    with pytest.raises(ModelError, match="texts only"):
        Judge(deaf, tiny_text, tiny_mimi).batch(Side(path=tmp_path / "empty.wav"))
