"""Speaking: every word once and in order, texts of any length, whole or as they arrive."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moshi_cli.core.config import ConditionConfig, FuserConfig, LmConfig, ModelConfig, Sampling
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import ModelError, UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.script import Script
from moshi_cli.core.text import Text, train_tokenizer
from moshi_cli.core.weights import Model
from moshi_cli.tasks import voices
from moshi_cli.tasks.events import Event, Speech, Word
from moshi_cli.tasks.loop import drive
from moshi_cli.tasks.manner import Manner, speaking_conditions, speaking_sampling, voice_prompt
from moshi_cli.tasks.prompter import Scribe, form_of
from moshi_cli.tasks.tts import (
    TTS,
    Recording,
    Speaking,
    arriving,
    keep,
    reader_for,
    speak,
    speaking_engine,
)
from moshi_cli.tasks.wording import Rest, Say

LAG = 4  # frames
WORDS = "one two three four say hello to the sky alfa bravo charlie zulu".split()


def build(mimi: Mimi, lm: LmConfig, text: Text, **more: object) -> Model:
    torch.manual_seed(0)
    config = ModelConfig(mimi=mimi.config, lm=lm, lags={"tts": -LAG * 0.08}, **more)  # type: ignore[arg-type]
    return Model(mimi, MoshiLm(lm).eval().requires_grad_(False), text, config, "tiny")


@pytest.fixture
def model(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    """Random weights: it says noise, but always the same."""
    return build(tiny_mimi, tiny_lm.config, tiny_text)


@pytest.fixture
def demux(tiny_mimi: Mimi, tiny_lm: MoshiLm, tiny_text: Text) -> Model:
    """Like the published TTS: a second text stream, two words ahead."""
    return build(tiny_mimi, replace(tiny_lm.config, demux=True), tiny_text, kind="tts", ahead=2)


@pytest.fixture(params=["plain", "demux"])
def either(request: pytest.FixtureRequest) -> Model:
    return request.getfixturevalue("model" if request.param == "plain" else "demux")


def a_text(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    parts = [rng.choice(WORDS) + rng.choice(["", "", " [pause:200ms]"]) for _ in range(words)]
    return " ".join(parts)


def narrow(engine: Engine, words: int, tokens: int) -> Engine:
    """An engine whose pump has small tables."""
    old = engine.stepper.steer
    assert isinstance(old, Script)
    script = Script(
        old.card, ahead=old.ahead, max_padding=old.max_padding,
        initial_padding=old.initial_padding, words=words, tokens=tokens,
    )  # fmt: skip
    return Engine(engine.model, engine.task, engine.slots, sampling=engine.sampling, steer=script)


def said(engine: Engine, *sessions: Speaking) -> list[Recording]:
    found: dict[int, list[Event]] = {id(s): [] for s in sessions}
    for session, event in drive(engine, sessions):
        found[id(session)].append(event)
    return [keep(found[id(s)]) for s in sessions]


def same(a: Recording, b: Recording) -> bool:
    close = len(a.pcm) == len(b.pcm) and torch.allclose(a.pcm, b.pcm, atol=1e-5)
    return bool(close) and a.words == b.words


# Scripts ------------------------------------------------------------------------------------------


def test_entries_are_those_of_the_published_tools(tiny_text: Text) -> None:
    items = [Say("Hi’s"), Say("(a:b)"), Rest(0.5), Say("one", 1)]
    lines = list(Scribe(tiny_text, speakers=True).write(items))
    assert [line.word for line in lines] == ["Hi's", "a", "b", None, "one"]
    assert lines[0].entry.tokens[0] == 1 and lines[4].entry.tokens[0] == 2
    assert lines[1].entry.tokens[0] > 3
    for line in lines:
        count = len(line.entry.tokens)
        assert line.entry.padding == (count if count else round(0.5 * 12.5))
    (alone,) = Scribe(tiny_text, padding_between=0).write([Say("one")])
    assert alone.entry.padding == 0 and alone.entry.tokens == tuple(tiny_text.encode("one"))


def test_two_speakers_at_most(tiny_text: Text) -> None:
    with pytest.raises(UsageError):
        list(Scribe(tiny_text, speakers=True).write([Say("one", 2)]))


def test_the_tokenizer_says_how_words_are_written(tiny_text: Text) -> None:
    assert form_of(tiny_text) == "split"
    assert form_of(train_tokenizer(["forty-two x-ray"] * 9, 300)) == "plain"
    assert form_of(train_tokenizer(["Hello there"] * 9, 300)) == "written"


# Speaking -----------------------------------------------------------------------------------------


def test_every_word_is_said_once_and_in_order(either: Model) -> None:
    text = a_text(8)
    recording = speak(either, text)
    assert [w.text for w in recording.words] == [w for w in text.split() if w[0] != "["]
    starts = [w.start_s for w in recording.words]
    assert starts == sorted(set(starts))
    assert all(w.start_s < w.end_s <= w.start_s + 1 for w in recording.words[:-1])
    assert recording.words[-1].end_s <= len(recording.pcm) / 24_000
    assert len(recording.pcm) % 1920 == 0 and recording.pcm.isfinite().all()


def test_speech_comes_in_frames(model: Model) -> None:
    sessions = [Speaking(model, "one two")]
    events = [event for _, event in drive(speaking_engine(model), sessions)]
    frames = [event for event in events if isinstance(event, Speech)]
    assert all(frame.pcm.shape == (1, 1920) for frame in frames)
    assert [f.start_s for f in frames] == pytest.approx([i * 0.08 for i in range(len(frames))])


@pytest.mark.parametrize("size", [1, 5])
def test_a_text_that_arrives_sounds_like_the_whole(either: Model, size: int) -> None:
    text = a_text(5)
    whole = speak(either, text, seed=3)

    def chunks() -> Iterator[str]:
        for i in range(0, len(text), size):
            yield text[i : i + size]

    assert either.text is not None
    source = arriving(chunks(), reader_for(either.text, Manner()))
    (streamed,) = said(speaking_engine(either), Speaking(either, source, seed=3))
    assert same(whole, streamed)


def test_speech_begins_before_the_text_is_over(either: Model) -> None:
    """No more words are read than the model must see: the next one, and those ahead."""
    read: list[str] = []

    def chunks() -> Iterator[str]:
        for word in a_text(16).split():
            read.append(word)
            yield word + " "

    assert either.text is not None
    source = arriving(chunks(), reader_for(either.text, Manner()))
    session = Speaking(either, source)
    first = None
    for _, event in drive(speaking_engine(either), [session]):
        if isinstance(event, Speech) and first is None:
            first = len(read)
    assert first is not None and first < 12 < len(read)


def test_a_word_is_said_while_the_next_one_is_not_known_yet(model: Model) -> None:
    """Its tokens, and a pause after it, need no further word."""
    told: list[int] = []  # frames made by the time each word is asked for
    made = 0

    def chunks() -> Iterator[str]:
        for word in ("one ", "[pause:800ms] ", "two "):
            told.append(made)
            yield word

    assert model.text is not None
    source = arriving(chunks(), reader_for(model.text, Manner()))
    session = Speaking(model, source)
    for _, event in drive(speaking_engine(model), [session]):
        made += isinstance(event, Speech)
    assert told[2] - told[1] >= 5 and [w for w in told if w] == told[2:]


def test_small_tables_hold_long_texts(either: Model) -> None:
    """The window moves along without the pump noticing, at any place."""
    text = a_text(14, seed=1)
    engine = speaking_engine(either)
    (whole,) = said(engine, Speaking(either, text))
    for words, tokens in ((7, 64), (9, 24)):
        (moved,) = said(narrow(engine, words, tokens), Speaking(either, text))
        assert same(whole, moved)


def test_a_batch_gives_what_one_by_one_gives(either: Model) -> None:
    texts = [a_text(n, seed=n) for n in (2, 6, 1, 4)]

    def sessions() -> list[Speaking]:
        return [Speaking(either, text, seed=i) for i, text in enumerate(texts)]

    alone = said(speaking_engine(either, 1), *sessions())
    together = said(speaking_engine(either, 3), *sessions())
    assert all(map(same, alone, together))


def test_a_pause_lasts(model: Model) -> None:
    """The word after a rest of a second begins at least a second after the one before."""
    short = speak(model, "one two").words
    long = speak(model, "one [pause:1s] two").words
    assert short[1].start_s - short[0].start_s < 1 <= long[1].start_s - long[0].start_s


@pytest.mark.parametrize("text", ["", "  \n", "[pause:1s]"])
def test_nothing_to_say(model: Model, text: str) -> None:
    with pytest.raises(UsageError):
        speak(model, text)


def test_words_it_has_not_learnt_are_named(model: Model) -> None:
    (warning,) = speak(model, "one xylophone").warnings
    assert warning.code == "vocabulary" and "xylophone" in warning.message


def test_the_seed_decides(model: Model) -> None:
    first, again, other = (speak(model, "one two", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.pcm, again.pcm)
    assert len(first.pcm) != len(other.pcm) or not torch.equal(first.pcm, other.pcm)


# Manner -------------------------------------------------------------------------------------------


def test_guidance_is_refused_where_it_was_not_learnt(model: Model) -> None:
    drawn = speaking_sampling(model.config, Manner())
    assert not drawn.guided and drawn.text_temp == 1.0 and drawn.temp == model.config.sampling.temp
    assert speaking_sampling(model.config, Manner(temperature=0.3)).text_temp == 0.3
    with pytest.raises(ModelError):
        speaking_sampling(model.config, Manner(cfg_coef=2.0))


def test_guidance_that_a_model_of_several_tasks_learnt(model: Model) -> None:
    learnt = Sampling(temp=0.4, guidance=2.0, guide_text=False)
    config = replace(model.config, samplings={"tts": learnt})
    drawn = speaking_sampling(config, Manner())
    assert (drawn.temp, drawn.text_temp, drawn.guidance, drawn.guide_text) == (0.4, 1.0, 2.0, False)
    assert speaking_sampling(config, Manner(cfg_coef=1.5, temperature=0.6)).guidance == 1.5
    assert not speaking_sampling(config, Manner(cfg_coef=1.0)).guided
    own = Engine(replace(model, config=config), config.fit(TTS), 1, steer=Script(9))
    assert own.sampling == learnt and len(own.state.step.lm.clock) == 2


def test_guidance_of_a_published_model(demux: Model) -> None:
    assert speaking_sampling(demux.config, Manner()).guidance == 2.0
    assert speaking_sampling(demux.config, Manner()).text_temp == demux.config.sampling.text_temp
    assert speaking_sampling(demux.config, Manner(cfg_coef=1.0)).guided is False


def test_guidance_as_a_condition(demux: Model) -> None:
    assert demux.config.lm is not None
    cfg = ConditionConfig("cfg", "lut", 4, 2, ("1.0", "2.0"))
    lm = replace(demux.config.lm, conditions=(cfg,), fuser=FuserConfig(sum=("cfg",)))
    config = replace(demux.config, lm=lm)
    assert not speaking_sampling(config, Manner()).guided
    assert speaking_conditions(config, Manner()) == {"cfg": "2.0"}
    with pytest.raises(UsageError):
        speaking_conditions(config, Manner(cfg_coef=7.0))


def test_faster_means_less_padding(model: Model) -> None:
    assert speaking_sampling(model.config, Manner(speed=2.0)).pad_bonus < 0
    assert speaking_sampling(model.config, Manner(speed=0.5)).pad_bonus > 0
    with pytest.raises(UsageError):
        speaking_sampling(model.config, Manner(speed=0.0))


def test_temperature_zero_ignores_the_seed(model: Model) -> None:
    cold = Manner(temperature=0.0)
    one, two = (speak(model, "one two", seed=s, manner=cold) for s in (1, 2))
    assert torch.equal(one.pcm, two.pcm)


# Voices -------------------------------------------------------------------------------------------


def voiced(demux: Model) -> Model:
    assert demux.config.lm is not None
    condition = ConditionConfig("speaker_wavs", "tensor", 6)
    temporal = replace(demux.config.lm.temporal, cross_attention=True)
    fuser = FuserConfig(cross=("speaker_wavs",), cross_positions=True)
    lm = replace(demux.config.lm, conditions=(condition,), fuser=fuser, temporal=temporal)
    return build(demux.mimi, lm, demux.text, kind="tts", ahead=2, voice_id="sig@1")  # type: ignore[arg-type]


def test_a_voice_file_changes_the_voice(demux: Model, tmp_path: Path) -> None:
    model, path = voiced(demux), tmp_path / "anna.sig@1.safetensors"
    save_file({"speaker_wavs": torch.randn(1, 6, 5)}, path)
    voice = voices.read_embedding(voices.find_voice(str(path), model.config))
    assert voice.shape == (5, 6)
    manner = Manner(temperature=0.0, cfg_coef=1.0)
    with_it = speak(model, "one two", manner=manner, embeddings=[voice])
    without = speak(model, "one two", manner=manner)
    assert len(with_it.pcm) != len(without.pcm) or not torch.equal(with_it.pcm, without.pcm)


def test_places_of_speakers() -> None:
    places = voices.speakers([torch.ones(3, 6), torch.zeros(2, 6)], 6).view(5, 3, 6)
    assert places[0].eq(1).all() and places[1, :2].eq(0).all()
    assert places[1, 2].isnan().all() and places[2:].isnan().all()
    with pytest.raises(UsageError):
        voices.speakers([torch.ones(3, 6)] * 6, 6)


def test_a_recording_is_continued(demux: Model) -> None:
    """A model without voice embeddings takes a prompt; it is not part of the result."""
    sound = torch.randn(10 * 1920) * 0.2
    prompt = voice_prompt(demux, sound)
    assert prompt.shape == (9, 8) and prompt[0].eq(-1).all() and prompt[1:5].ge(0).all()
    engine = speaking_engine(demux, 1, prompt_frames=8)
    session = Speaking(demux, "one two three", prompt=prompt)
    (recording,) = said(engine, session)
    assert [w.text for w in recording.words] == ["one", "two", "three"]
    assert 0 <= recording.words[0].start_s <= 1 and len(recording.pcm) == session.samples


def test_voices_that_cannot_be_had(model: Model, demux: Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its own"):
        voices.find_voice("anna", model.config)
    with pytest.raises(ModelError):
        voices.find_voice("missing.wav", demux.config)
    wav = tmp_path / "anna.wav"
    wav.write_bytes(b"RIFF")
    assert voices.find_voice(str(wav), demux.config) == wav
    with pytest.raises(ModelError, match="voice files"):
        voices.find_voice(str(wav), voiced(demux).config)


def test_what_is_no_voice_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ModelError):
        voices.read_embedding(path)


def test_words_have_their_frame(model: Model) -> None:
    """A word starts in the frame of its first token, one after the boundary."""
    engine = speaking_engine(model)
    session = Speaking(model, "one two")
    words = [event for _, event in drive(engine, [session]) if isinstance(event, Word)]
    began = session.prompter.began
    assert [round(w.start_s * 12.5) for w in words] == [began[0] + 1, began[1] + 1]
