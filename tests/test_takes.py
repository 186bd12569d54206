"""Takes: sentences, what the ear makes of them, and which one is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moshi_cli import app as cli
from moshi_cli.core import audio
from moshi_cli.core.config import ConditionConfig, FuserConfig, ModelConfig, Sampling
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.core.kyutai_lm import read_sampling, write_sampling
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text
from moshi_cli.core.weights import Model, load, save
from moshi_cli.tasks.asr import ASR
from moshi_cli.tasks.events import End, Event, Word
from moshi_cli.tasks.likelihood import Examiner, Scene, nlls
from moshi_cli.tasks.loop import drive
from moshi_cli.tasks.manner import Manner
from moshi_cli.tasks.takes import MOST, Choice, Ear, Take, sentences, speak_best
from moshi_cli.tasks.tts import read, speak, speaking_engine
from moshi_cli.tasks.wording import Item, Reader, Rest, Say

TEXT = "one two three four. five six seven. [pause:400ms] eight nine ten!"


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    """Random weights that speak noise, and hear."""
    torch.manual_seed(0)
    lm = replace(tiny_lm.config, conditions=())
    config = ModelConfig(mimi=tiny_mimi.config, lm=lm, lags={"tts": -0.32, "asr": 0.32})
    return Model(tiny_mimi, MoshiLm(lm).eval().requires_grad_(False), tiny_text, config, "tiny")


def items(text: str, form: str = "written") -> list[Item]:
    reader = Reader(form=form)
    return reader.push(text) + reader.flush()


def words(parts: list[list[Item]]) -> list[str]:
    return [" ".join(i.word for i in part if isinstance(i, Say)) for part in parts]


# Sentences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["written", "plain", "split"])
def test_sentences_end_where_they_end(form: str) -> None:
    parts = sentences(items('She left at once. "Did he see it?" Nobody knows - not I', form))
    counts = [len(part.split()) for part in words(parts)]
    assert counts[:2] == [4, 4] and len(counts) == 3
    assert [item for part in parts for item in part] == items(
        'She left at once. "Did he see it?" Nobody knows - not I', form
    )


def test_short_sentences_go_with_others() -> None:
    assert words(sentences(items("No. I did not. Why?"))) == ["No. I did not. Why?"]
    assert words(sentences(items("It is so. Yes."))) == ["It is so. Yes."]
    assert words(sentences(items("Yes."))) == ["Yes."]


def test_a_rest_belongs_to_what_follows_or_to_the_end() -> None:
    parts = sentences(items("One two three. [pause:1s] Four five six. [pause:2s]"))
    assert [[i for i in p if isinstance(i, Rest)] for p in parts] == [[], [Rest(1.0), Rest(2.0)]]


def test_what_has_no_letters_is_no_word(model: Model) -> None:
    assert words(sentences(items("One two three. - ( ... ) ! - Four."))) == [
        "One two three. - ( ... ) ! - Four."
    ]
    assert [w.text for w in speak_best(model, "one two three. ( ) ... ( )", 2).words] == [
        "one", "two", "three",
    ]  # fmt: skip


def test_what_never_ends_is_cut() -> None:
    parts = sentences(items("word " * (2 * MOST + 5)))
    assert [len(p) for p in parts] == [MOST, MOST, 5]


@pytest.mark.parametrize("text", ["", "[pause:1s]"])
def test_nothing_to_say(model: Model, text: str) -> None:
    with pytest.raises(UsageError):
        speak_best(model, text, 2)


# The ear ------------------------------------------------------------------------------------------


def spoken(model: Model, count: int, *, codebooks: int | None = None) -> list[Take]:
    """The takes of the first sentence."""
    manner = Manner(codebooks=codebooks)
    assert model.text is not None
    choice = Choice(model, read(TEXT, model.text, manner), count, seed=3, manner=manner)
    first = [take for take in choice.sessions if take.part == 0]
    list(drive(speaking_engine(model, count, manner, decode=False), first))
    return first


@pytest.mark.parametrize("codebooks", [None, 2])
def test_the_ear_adds_up_what_is_not_heard(
    model: Model, codebooks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word by word and take by take, as `moshi eval lm` would count it."""
    assert model.lm is not None and model.text is not None
    takes = spoken(model, 3, codebooks=codebooks)
    lm, task = model.lm.config, model.config.fit(ASR)
    lost = 6.5  # a model that has learnt nothing hears little
    monkeypatch.setattr("moshi_cli.tasks.takes.LOST", lost)
    expected = []
    for take in takes:
        total = 0.0
        for width in (1, 2, 4):  # of four codebooks
            made = torch.stack(take.codes, 1)[:width]
            codes = torch.full((1, lm.voice_q, made.shape[1]), -1)
            codes[0, : len(made)] = made
            timed = tuple((w.text, w.start_s, w.end_s) for w in take.spoken)
            examiner = Examiner(model.lm, model.text, task)
            found = nlls(model.lm, examiner.batch([Scene(codes, timed)]))
            for nats, asked, token in zip(
                found.nats[0, 0].tolist(), found.mask[0, 0].tolist(), found.text[0].tolist(),
                strict=True,
            ):  # fmt: skip
                if asked and token not in (lm.text_pad, lm.text_epad):
                    total += min(nats, lost)
        expected.append(total)
    assert Ear(model).missed(takes) == pytest.approx(expected, rel=1e-4)
    assert len({round(x, 3) for x in expected}) > 1


def test_a_model_that_cannot_hear_has_one_take(model: Model) -> None:
    deaf = replace(model, config=replace(model.config, lags={"tts": -0.32}))
    with pytest.raises(ModelError, match="cannot hear"):
        speak_best(deaf, TEXT, 2)


# The choice ---------------------------------------------------------------------------------------


def test_one_take_of_one_sentence_is_what_is_said_anyway(model: Model) -> None:
    best = speak_best(model, "one two three", 1, seed=7)
    plain = speak(model, "one two three", seed=7)
    assert torch.allclose(best.pcm, plain.pcm, atol=1e-5) and best.words == plain.words


def test_what_is_heard_best_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentence by sentence in their order, with the times of the words, whoever ends first."""
    liked = {0: 2, 1: 0, 2: 1}  # sentence -> its best take

    def missed(self: Ear, takes: list[Take]) -> list[float]:
        assert [take.seed for take in takes] == [5 + 3 * takes[0].part + n for n in range(3)]
        return [abs(n - liked[takes[0].part]) + 0.5 for n in range(3)]

    monkeypatch.setattr(Ear, "missed", missed)
    best = speak_best(model, TEXT, 3, seed=5)
    assert model.text is not None
    at, pcm, told = 0.0, [], []
    for part, items_ in enumerate(sentences(read(TEXT, model.text, Manner()))):
        take = Take(model, items_, part, seed=5 + 3 * part + liked[part])
        list(drive(speaking_engine(model, 1, decode=False), [take]))
        codes = torch.stack(take.codes, 1)
        pcm.append(model.mimi.decode(codes[None])[0, 0])
        told += [Word(w.text, at + w.start_s, at + w.end_s) for w in take.spoken]
        at += len(pcm[-1]) / 24_000
    torch.testing.assert_close(best.pcm, torch.cat(pcm), atol=1e-5, rtol=1e-4)
    assert [w.text for w in best.words] == TEXT.replace(".", "").replace("!", "").replace(
        "[pause:400ms] ", ""
    ).split()
    for a, b in zip(best.words, told, strict=True):
        assert (a.start_s, a.end_s) == pytest.approx((b.start_s, b.end_s))


def test_slots_change_nothing(model: Model) -> None:
    assert model.text is not None
    found = []
    for slots in (1, 2, 7):
        choice = Choice(model, read(TEXT, model.text, Manner()), 2, seed=1)
        events: list[Event] = []
        for take, event in drive(speaking_engine(model, slots, decode=False), choice.sessions):
            if isinstance(event, End):
                events += choice.end(take)
        found.append([e for e in events if isinstance(e, Word)])
        assert choice.samples > 0
    assert found[0] == found[1] == found[2] and len(found[0]) == 10


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def invoke(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`moshi tts` with a model that usually takes two takes."""
    usual = replace(model.config.sampling, takes=2)
    save(replace(model, config=replace(model.config, samplings={"tts": usual})), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOSHI_MODEL", "model")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def call(*args: object, **extra: Any) -> Any:
        return CliRunner().invoke(cli.app, ["tts", *map(str, args)], **extra)

    return call


def sound(path: str) -> torch.Tensor:
    return audio.read(path)[0]


def test_takes_are_the_models_or_ones_own(invoke: Callable[..., Any], model: Model) -> None:
    for name, args in {"usual": [], "two": ["--takes", 2], "one": ["--takes", 1]}.items():
        done = invoke(TEXT, *args, "-o", f"{name}.wav")
        assert done.exit_code == 0, done.stderr
        assert "first sound after" in done.stderr and "RTF" in done.stderr
    assert torch.equal(sound("usual.wav"), sound("two.wav"))
    best = speak_best(load("model"), TEXT, 2).pcm.clamp(-1, 1)
    assert torch.allclose(sound("two.wav"), best, atol=1e-4)
    assert torch.allclose(sound("one.wav"), speak(model, TEXT).pcm.clamp(-1, 1), atol=1e-4)


def test_text_that_arrives_is_spoken_at_once(invoke: Callable[..., Any]) -> None:
    assert invoke("-", "-o", "stdin.wav", input=TEXT).exit_code == 0
    assert invoke(TEXT, "--takes", 1, "-o", "one.wav").exit_code == 0
    assert Path("stdin.wav").read_bytes() == Path("one.wav").read_bytes()
    assert invoke("-", "--takes", 2, "-o", "two.wav", input=TEXT).exit_code == 0
    assert invoke(TEXT, "-o", "usual.wav").exit_code == 0
    assert Path("two.wav").read_bytes() == Path("usual.wav").read_bytes()


def test_a_batch_of_takes_gives_what_one_by_one_gives(invoke: Callable[..., Any]) -> None:
    Path("texts.jsonl").write_text(
        '{"id": "a", "text": "one two three. four five six."}\n'
        '{"id": "b", "text": ""}\n{"id": "c", "text": "seven eight"}\n'
    )
    for size in (1, 3):
        done = invoke("--manifest", "texts.jsonl", "-o", f"out{size}/", "--batch-size", size)
        assert done.exit_code == 3 and len(done.stderr.splitlines()) < 12
    for name in ("a", "c"):
        one, three = (sound(f"out{size}/{name}.wav") for size in (1, 3))
        assert torch.allclose(one, three, atol=1e-4)
    assert not Path("out1/b.wav").exists()


@pytest.mark.parametrize("size", [1, 2])
def test_as_many_texts_go_on_as_were_asked_for(
    invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Slots of takes that have ended stay free until the text is kept: its time is its own."""
    going: list[int] = []  # texts, at each beginning of a take
    texts: set[int] = set()
    begin, end = Choice.__init__, Choice.end

    def began(self: Choice, *args: Any, **how: Any) -> None:
        begin(self, *args, **how)
        texts.add(id(self))
        going.append(len(texts))

    def ended(self: Choice, take: Take) -> list[Event]:
        found = list(end(self, take))
        if self.part > self.sessions[-1].part:
            texts.discard(id(self))
        return found

    def over(self: Take) -> bool:  # one take after the other
        return self.frames is not None and self.frame >= self.frames + self.seed % 3

    monkeypatch.setattr(Take, "over", property(over))
    monkeypatch.setattr(Choice, "__init__", began)
    monkeypatch.setattr(Choice, "end", ended)
    rows = [f'{{"id": "{i}", "text": "{"one two " * (4 - i)}"}}' for i in range(4)]
    Path("texts.jsonl").write_text("\n".join(rows))
    done = invoke("--manifest", "texts.jsonl", "-o", "out/", "--batch-size", size, "--takes", 3)
    assert done.exit_code == 0, done.stderr
    assert len(going) == 4 and max(going) == size and not texts
    assert len(list(Path("out").glob("*.wav"))) == 4


def test_a_model_that_cannot_hear_is_refused_in_a_line(
    model: Model, invoke: Callable[..., Any]
) -> None:
    save(replace(model, config=replace(model.config, lags={"tts": -0.32})), Path("deaf"))
    done = invoke(TEXT, "--takes", 3, "-o", "x.wav", "--model", "deaf")
    assert done.exit_code != 0 and "cannot hear" in done.stderr and "Traceback" not in done.stderr
    assert not Path("x.wav").exists()


def test_a_file_says_how_many_takes() -> None:
    assert read_sampling(write_sampling(Sampling(takes=8)), Sampling()).takes == 8
    assert "takes" not in write_sampling(Sampling())
    with pytest.raises(UsageError):
        Sampling(takes=0)


def test_compiling_asks_for_nothing_that_a_session_tells(
    model: Model, invoke: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is told its lag can be tried out before anybody has a slot."""
    assert model.lm is not None
    lag = ConditionConfig("lag", "lut", dim=4, values=("-4", "4"))
    lm = replace(model.lm.config, conditions=(lag,), fuser=FuserConfig(sum=("lag",)))
    told = replace(model, lm=MoshiLm(lm), config=replace(model.config, lm=lm))
    save(told, Path("told"))
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    for name, args in {"plain": [], "compiled": ["--compile"]}.items():
        done = invoke(TEXT, *args, "-o", f"{name}.wav", "--model", "told")
        assert done.exit_code == 0 and "does not work" not in done.stderr, done.stderr
    assert torch.allclose(sound("plain.wav"), sound("compiled.wav"), atol=1e-3)
