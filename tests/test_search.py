"""Beam search over text, and the n-grams that it may ask: against slow versions of both."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor

from moshi_cli.core import search as searching
from moshi_cli.core import weights
from moshi_cli.core.config import ModelConfig, Sampling
from moshi_cli.core.engine import Engine
from moshi_cli.core.errors import InputError, ModelError, UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.ngram import (
    BESIDE,
    NOTHING,
    REMEMBERED,
    UNKNOWN,
    NGram,
    Words,
    load_ngram,
    shared,
)
from moshi_cli.core.presets import MOSHI_NANO
from moshi_cli.core.recurrent import Recurrent
from moshi_cli.core.search import HOLD, LIKELIEST, LOST, PAUSE, merged
from moshi_cli.core.streams import ZERO, DelayPattern, Role, Task
from moshi_cli.core.text import BOS, EOS, EPAD, PAD, Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks.arpa import Spelled, read_arpa
from moshi_cli.tasks.asr import ASR, hearing_sampling, transcribe
from moshi_cli.tasks.chat import CHAT
from moshi_cli.tasks.ngrams import DISCOUNT, count, sentences, words_of

FRAME = 1920
SIZE = 12
ROWS = [[BOS, 4, 5, 6, EOS], [BOS, 4, 5, 7, 7, EOS], [BOS, 5, 6, EOS], [BOS, 4, 5, 6, 9, EOS]]
ASR_3 = replace(ASR, lag_s=0.24)


def slow_ngram(rows: list[list[int]], order: int, past: list[int], token: int) -> float:
    """Interpolated Kneser-Ney by the book, with raw counts after BOS."""
    grams = [Counter[tuple[int, ...]]() for _ in range(order + 1)]
    for row in rows:
        for n in range(1, order + 1):
            grams[n].update(tuple(row[i - n + 1 : i + 1]) for i in range(max(n - 1, 1), len(row)))
    p = 1 / SIZE
    for n in range(1, order + 1):
        counts = grams[n]
        if n < order:
            before = Counter(gram[1:] for gram in grams[n + 1])
            counts = Counter(
                {g: c if g[0] == BOS and n > 1 else before[g] for g, c in grams[n].items()}
            )
        history = tuple(past[len(past) - n + 1 :])
        own = {g[-1]: c for g, c in counts.items() if g[:-1] == history and c}
        if len(past) < n - 1 or not own:
            break
        total = sum(own.values())
        p = (max(own.get(token, 0) - DISCOUNT, 0) + DISCOUNT * len(own) * p) / total
    return math.log(p)


def past_of(tokens: list[int], size: int) -> Tensor:
    return torch.tensor([([NOTHING] * size + tokens)[-size:]])


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ngrams_are_those_of_the_book(order: int) -> None:
    made = count(ROWS, order, SIZE)
    for past in ([BOS], [BOS, 4], [BOS, 4, 5], [4, 5, 7], [9, 9, 9], [5, 7, 7]):
        every = torch.arange(SIZE)[None]
        found = made(past_of(past, max(order - 1, 1)), every)[0]
        slow = [
            slow_ngram(ROWS, order, past[-(order - 1) :] if order > 1 else [], t)
            for t in range(SIZE)
        ]
        assert found.tolist() == pytest.approx(slow, abs=2e-3)
        assert float(found.exp().sum()) == pytest.approx(1, abs=5e-3)


def test_rare_ngrams_are_left_to_shorter_ones(tmp_path: Path) -> None:
    whole, some = count(ROWS, 3, SIZE), count(ROWS, 3, SIZE, (1, 2))
    assert len(some.grams.keys) < len(whole.grams.keys)
    assert len(some.histories.keys) < len(whole.histories.keys)
    for past in ([BOS, 4], [4, 5], [5, 7]):
        assert float(some(past_of(past, 2), torch.arange(SIZE)[None]).exp().sum()) == pytest.approx(
            1, abs=5e-3
        )
    some.save(tmp_path / "n")
    again = load_ngram(tmp_path / "n")
    tokens = torch.tensor([[4, 6, 11]])
    torch.testing.assert_close(
        again(past_of([4, 5], 2), tokens), some(past_of([4, 5], 2), tokens), atol=2e-3, rtol=0
    )
    with pytest.raises(InputError, match="no text"):
        count([[BOS]], 2, SIZE)


def test_two_tables_have_a_share_each() -> None:
    short, long = count(ROWS, 2, SIZE), count([[BOS, 9, 9, 4, 9, EOS]], 4, SIZE)
    for first, second in ((short, long), (long, short)):
        both = first.mixed(second).to("cpu")
        assert both.context == 3
        past, every = past_of([BOS, 9, 9], both.context), torch.arange(SIZE)[None]
        mean = (1 - BESIDE) * first(past, every).exp() + BESIDE * second(past, every).exp()
        torch.testing.assert_close(both(past, every).exp(), mean)
        assert not torch.allclose(mean, first(past, every).exp(), rtol=0.1)


def recurrent_model(size: int) -> Recurrent:
    """Random weights that have an opinion."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = Recurrent(size, 6, 10).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(3)
    model.refresh()
    return model


def remembered(model: Recurrent, said: list[int]) -> Tensor:
    """What it remembers of tokens after BOS, one by one."""
    memory = torch.zeros(1, model.memory)
    for token in said:
        memory = model.step(memory, torch.tensor([token]))
    return memory


def give_words(ngram: NGram, tmp_path: Path, text: Text) -> None:
    """Words, and n-grams of them, made up."""
    path = tmp_path / "words.arpa"
    words = ["one", "two", "three", "four"]
    pairs = [f"-0.5 {a} {b} -0.1" for a, b in zip(["<s>", *words], words, strict=False)]
    triples = [f"-0.3 {a} {b} {a}" for a, b in pairwise(words)]
    single = [f"-0.{n + 5} {word} -0.2" for n, word in enumerate(["<s>", *words])]
    parts = ("\\data\\", "\\1-grams:", *single, "\\2-grams:", *pairs, "\\3-grams:", *triples)
    path.write_text("\n".join([*parts, "\\end\\", ""]))
    spelled = Spelled(read_arpa(path), text)
    ngram.words, ngram.wordgrams = words_of(spelled.rows, text), spelled.tables(99)


def placed(ngram: NGram, said: list[int]) -> Tensor | None:
    """Where n-grams of words are after tokens that follow BOS, one by one."""
    if not ngram.worded:
        return None
    place = torch.zeros(1, 3, dtype=torch.long)
    for token in said:
        place = ngram.placed(place, torch.tensor([token]))
    return place


def test_a_recurrent_model_has_half_a_say(tmp_path: Path) -> None:
    made = count(ROWS, 3, SIZE)
    plain, every = count(ROWS, 3, SIZE), torch.arange(SIZE)[None]
    made.recurrent = recurrent_model(SIZE)
    made.save(tmp_path / "n")
    again = load_ngram(tmp_path / "n")
    assert again.recurrent is not None and again.memory == 27
    for said in ([], [4, 5], [5, 7, 7, 9]):
        past = past_of([BOS, *said], 2)
        told = made.recurrent(torch.tensor([[BOS, *said]]))[:, -1].softmax(-1)
        mean = (1 - REMEMBERED) * plain(past, every).exp() + REMEMBERED * told
        for ngram in (made, again, again.mixed(plain)):
            found = ngram(past, every, remembered(made.recurrent, said)).exp()
            beside = BESIDE * plain(past, every).exp() if ngram.beside else 0 * mean
            wanted = mean if ngram.beside is None else (1 - BESIDE) * mean + beside
            torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)
        torch.testing.assert_close(made(past, every), plain(past, every))  # without a memory
        beyond = made(past, every + SIZE, remembered(made.recurrent, said))
        assert beyond.isfinite().all()  # a model's vocabulary may be larger


def test_a_word_is_unknown_to_both(tiny_text: Text) -> None:
    rows = sentences(["seven eleven", "nine"], tiny_text)
    made, plain = (count(rows, 2, tiny_text.size) for _ in range(2))
    made.recurrent = plain.recurrent = recurrent_model(tiny_text.size)
    made.words = words_of(rows, tiny_text)
    assert made.words is not None
    said, every = tiny_text.encode("seven"), torch.arange(4, 288)[None]
    past, place = past_of([BOS, *said], 1), placed(made, said)
    assert place is not None
    memory = remembered(made.recurrent, tiny_text.encode("seven"))
    less = plain(past, every, memory) - made(past, every, memory, place)
    torch.testing.assert_close(less, UNKNOWN * made.words.unknown(place, every).float())


def test_a_file_that_holds_no_ngrams(tmp_path: Path) -> None:
    (tmp_path / "n").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not n-grams"):
        load_ngram(tmp_path / "n")
    with pytest.raises(ModelError, match="not n-grams"):
        load_ngram(tmp_path / "missing")
    made = count(ROWS, 2, SIZE)
    made.words = Words(torch.ones(SIZE - 1, dtype=torch.bool), torch.tensor([1, 2]).int())
    made.save(tmp_path / "n")
    with pytest.raises(ModelError, match="do not fit"):
        load_ngram(tmp_path / "n")
    made.words, made.recurrent = None, recurrent_model(SIZE + 1)
    made.save(tmp_path / "n")
    with pytest.raises(ModelError, match="its recurrent model is broken"):
        load_ngram(tmp_path / "n")
    made.recurrent.lstm.weight_hh_l0 = torch.nn.Parameter(torch.zeros(3))
    made.save(tmp_path / "n")
    with pytest.raises(ModelError, match="its recurrent model is broken"):
        load_ngram(tmp_path / "n")
    del made.recurrent.lstm.weight_hh_l0
    made.save(tmp_path / "n")
    with pytest.raises(ModelError, match=r"recurrent model is broken .*weight_hh_l0"):
        load_ngram(tmp_path / "n")


def test_sentences_are_words_by_themselves(tiny_text: Text) -> None:
    (row,) = sentences(["one two", "  "], tiny_text)
    assert row == [BOS, *tiny_text.encode("one"), *tiny_text.encode("two"), EOS]


def slow_unknown(words: list[list[int]], begins: set[int], past: list[int], token: int) -> bool:
    """Whether a token makes something that no word begins with, or leaves a word unfinished."""
    parts: list[list[int]] = [[]]  # of what was said, the last of which may go on
    for t in past:
        if t in begins or t in (NOTHING, BOS):
            parts.append([])
        parts[-1].append(t)
    last = parts[-1] if parts[-1] and parts[-1][0] in begins else []

    def begun(part: list[int]) -> bool:
        return any(word[: len(part)] == part for word in words)

    if token in begins:
        return not begun([token]) or (bool(last) and begun(last) and last not in words)
    return bool(last) and not begun([*last, token])


def test_pieces_that_make_no_word(tiny_text: Text, tmp_path: Path) -> None:
    said = ["seven", "eleven", "nine", "ninety"]
    rows = sentences([" ".join(said), "nine"], tiny_text)
    words = words_of(rows, tiny_text)
    assert words is not None
    tokens = [tiny_text.encode(word) for word in said]
    begins = {t for t in range(tiny_text.size) if words.begins[t]}
    assert {word[0] for word in tokens} <= begins
    every = torch.arange(4, tiny_text.size)
    pasts = [[BOS], [], [every[-1].item()], *([BOS, *w[:n]] for w in tokens for n in (1, 2, 9))]
    pasts += [[*a, *b] for a in tokens for b in tokens]
    for past in pasts:
        place = torch.zeros(1, 3, dtype=torch.long)
        for piece in past[past[:1] == [BOS] :]:
            place = words.step(place, torch.tensor([piece]))
        found = words.unknown(place, every[None])[0].tolist()
        assert found == [slow_unknown(tokens, begins, past, int(t)) for t in every], past
    plain, strict = (count(rows, 2, tiny_text.size) for _ in range(2))
    strict.words = words
    strict.save(tmp_path / "n")
    again, past = load_ngram(tmp_path / "n"), past_of([BOS, *tokens[0]], 1)
    place = placed(again, tokens[0])
    assert place is not None and again.context == 1
    torch.testing.assert_close(
        again(past, every[None], None, place),
        plain(past, every[None]) - UNKNOWN * words.unknown(place, every[None]),
        atol=1e-2, rtol=0,
    )  # fmt: skip
    both = again.mixed(plain).to("cpu")
    least = [float(model(past, every[None], None, place).min()) for model in (both, again)]
    assert least[0] > least[1] + 1
    other = plain.mixed(again)  # whose words count for less
    assert plain.worded < other.worded and other.placed(place, torch.tensor([tokens[0][0]])).any()
    told = other(past, every[None], None, place)
    wanted = shared(plain(past, every[None]), again(past, every[None], None, place), BESIDE)
    torch.testing.assert_close(told, wanted)


def test_the_same_words_are_one_hypothesis() -> None:
    score = torch.tensor([[-1.0, -2.0, -1.5, -9.0]])
    found = merged(score, torch.tensor([[7, 8, 7, 8]]))[0].tolist()
    assert found[0] == pytest.approx(math.log(math.exp(-1) + math.exp(-1.5)))
    assert found[1] == pytest.approx(math.log(math.exp(-2) + math.exp(-9)))
    assert found[2:] == [LOST, LOST]


# The search ----------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_mimi: Mimi) -> Model:
    """Random weights whose text is seldom sure of anything."""
    lm = MoshiLm(TINY_LM).eval().requires_grad_(False)
    with torch.no_grad():
        lm.text_linear.weight.mul_(4)
        lm.text_linear.weight[PAD].mul_(2)
    ngram = count([[BOS, *range(4, 60), EOS], [BOS, *range(60, 4, -2), EOS]], 3, 288)
    config = ModelConfig(mimi=TINY_MIMI, lm=TINY_LM, lags={"asr": 0.24, "chat": 0.0})
    return Model(tiny_mimi, lm, None, config, "tiny", ngram=ngram)


def slow_search(model: Model, wav: Tensor, sampling: Sampling, steps: int) -> list[int]:
    """The text frames of the best hypothesis by whole passes over each one, nothing cached, and
    nothing told before the end."""
    lm = model.lm
    assert lm is not None
    pattern = DelayPattern.of(ASR_3, TINY_LM)
    later = [FRAME * i // sampling.shifts for i in range(sampling.shifts)]
    heard = [model.mimi.encode(F.pad(wav, (late, -late)))[0] for late in later]
    assert heard[0].shape[1] == steps
    hypotheses: list[tuple[list[int], tuple[int, ...], float]] = [([], (), 0.0)]
    for step in range(pattern.delays[0], steps + 1):
        found: dict[Any, tuple[float, float, list[int], tuple[int, ...]]] = {}
        for row, words, score in hypotheses:
            told = []
            for codes in heard:
                grid = torch.full((1, TINY_LM.streams, steps), ZERO)
                grid[0, 0, : len(row)] = torch.tensor(row, dtype=torch.long)
                grid[0, 1:5] = codes
                inputs = pattern.shift(grid).inputs[..., : step + 1]
                told.append(lm.temporal(inputs)[1][0, -1].log_softmax(-1))
            likely = torch.stack(told).mean(0)
            value, token = likely.topk(max(LIKELIEST, sampling.beam))
            for v, t in zip(value.tolist(), token.tolist(), strict=True):
                after, total, key = words, score + v, (words, t)
                if t not in (PAD, EPAD):
                    if model.ngram is not None and sampling.lm_weight:
                        quiet = len(row) >= PAUSE and all(x in (PAD, EPAD) for x in row[-PAUSE:])
                        said = [BOS] if quiet else [BOS, *words]
                        past = past_of(said, model.ngram.order - 1)
                        net = model.ngram.recurrent
                        memory = None if net is None else remembered(net, said[1:])
                        place = placed(model.ngram, said[1:])
                        lm_value = float(model.ngram(past, torch.tensor([[t]]), memory, place))
                        total += sampling.lm_weight * lm_value + sampling.token_bonus
                    after = (*words, t)
                    key = (after, -1)
                old = found.get(key, (total, -math.inf, row, words))
                mass = (
                    float(torch.logaddexp(torch.tensor(old[0]), torch.tensor(total)))
                    if key in found
                    else total
                )
                best = (total, [*row, t], after) if total > old[1] else (old[1], old[2], old[3])
                found[key] = (mass, *best)
        ordered = sorted(found.values(), key=lambda f: -f[0])[: sampling.beam]
        hypotheses = [(row, words, mass) for mass, _, row, words in ordered]
    return hypotheses[0][0]


def texts(engine: Engine, wav: Tensor, slot: int, more: int) -> list[int]:
    """What a slot tells of a recording [1, 1, S] and `more` frames of silence."""
    engine.open(slot)
    told = []
    silence = torch.zeros(1, 1, more * FRAME)
    active = torch.arange(engine.slots) == slot
    for frame in torch.cat([wav, silence], 2).split(FRAME, 2):
        found = engine.step(frame.expand(engine.slots, 1, -1), active)
        if found.ready[slot]:
            told.append(int(found.text[slot]))
    return told


@pytest.mark.parametrize(("beam", "shifts"), [(2, 1), (5, 1), (4, 2), (2, 3)])
@pytest.mark.parametrize(("weight", "recurrent"), [(0.0, False), (0.5, False), (0.5, True)])
def test_search_is_the_slow_one(
    model: Model, tiny_text: Text, tmp_path: Path,
    beam: int, shifts: int, weight: float, recurrent: bool,
) -> None:  # fmt: skip
    assert model.ngram is not None
    if recurrent:
        model.ngram.recurrent = recurrent_model(288)
        give_words(model.ngram, tmp_path, tiny_text)
    bonus = 0.1 * (weight > 0)
    sampling = Sampling(
        0, 0, 0, 0, beam=beam, lm_weight=weight, token_bonus=bonus, shifts=shifts
    )  # fmt: skip
    steps = 13
    wav = torch.rand(1, 1, steps * FRAME, generator=torch.Generator().manual_seed(3)) - 0.5
    slow = slow_search(model, wav, sampling, steps)
    assert len(set(slow)) > 3  # it says something
    engine = Engine(model, ASR_3, 1, sampling=sampling)
    engine.open(0)
    for frame in wav.split(FRAME, 2):
        engine.step(frame)
    ring, clock = engine.state.step.ring.cells, int(engine.state.step.clock[0])
    cells = [int(ring[0, 0, s % ring.shape[2]]) for s in range(4, clock + 1)]
    assert cells == slow[: len(cells)]
    assert len(cells) == steps - 2


def test_what_is_told_is_final_and_of_one_hypothesis(model: Model) -> None:
    sampling = Sampling(0, 0, 0, 0, beam=4)
    wav = torch.rand(1, 1, 40 * FRAME) - 0.5
    engine = Engine(model, ASR_3, 1, sampling=sampling)
    engine.open(0)
    state, told = engine.state.step, []
    assert state.search is not None
    for frame in wav.split(FRAME, 2):
        found = engine.step(frame)
        if found.ready[0]:
            told.append(int(found.text[0]))
        clock, length = int(state.clock[0]), state.ring.cells.shape[2]
        for row in range(4):  # whoever is left says what was told
            if state.search.score[row] > LOST / 2:
                first = max(clock - HOLD - 3, 4)
                mine = [
                    int(state.ring.cells[row, 0, s % length])
                    for s in range(first, clock - HOLD + 1)
                ]
                assert mine == told[len(told) - len(mine) :] or not told
    assert len(told) == 40 - 3 - HOLD + 1


@pytest.mark.parametrize(("recurrent", "shifts"), [(False, 1), (True, 1), (True, 2)])
def test_slots_do_not_notice_each_other(
    model: Model, tiny_text: Text, tmp_path: Path, recurrent: bool, shifts: int
) -> None:
    assert model.ngram is not None
    if recurrent:
        model.ngram.recurrent = recurrent_model(288)
        give_words(model.ngram, tmp_path, tiny_text)
    sampling = Sampling(0, 0, 0, 0, beam=3, lm_weight=0.3, shifts=shifts)
    wavs = [torch.rand(1, 1, 20 * FRAME) - 0.5 for _ in range(2)]
    alone = [texts(Engine(model, ASR_3, 1, sampling=sampling), wav, 0, 15) for wav in wavs]
    assert alone[0] != alone[1]
    engine = Engine(model, ASR_3, 3, sampling=sampling)
    assert texts(engine, wavs[0], 1, 15) == alone[0]
    assert texts(engine, wavs[1], 2, 15) == alone[1]
    assert texts(engine, wavs[1], 1, 15) == alone[1]  # opened again
    engine.open(0)
    engine.open(2)
    both: dict[int, list[int]] = {0: [], 2: []}
    silence = torch.zeros(1, 1, 15 * FRAME)
    sounds = [torch.cat([wav, silence], 2).split(FRAME, 2) for wav in wavs]
    for t in range(35):
        for late in (False, True):  # slot 0 pauses in every other step
            pcm = torch.cat([sounds[0][t], sounds[1][0] * 0, sounds[1][t]])
            active = torch.tensor([not late, False, late])
            found = engine.step(pcm, active)
            for slot in both:
                if found.ready[slot]:
                    both[slot].append(int(found.text[slot]))
    assert both[0] == alone[0] and both[2] == alone[1]


@pytest.mark.parametrize("immediate", [True, False])
def test_what_is_remembered_is_forgotten_at_a_pause(
    model: Model, tiny_text: Text, tmp_path: Path, immediate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "immediate", lambda tensor: immediate)
    assert model.ngram is not None
    net = model.ngram.recurrent = recurrent_model(288)
    give_words(model.ngram, tmp_path, tiny_text)
    search = searching.Search(TINY_LM, Sampling(0, 0, 0, 0, beam=3, lm_weight=0.5), model.ngram)
    state, never = search.init_state(3, "cpu"), torch.zeros(3, dtype=torch.bool)
    said, rests = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    first = tiny_text.encode("one")[0]  # begins a word
    search.remember(state, torch.tensor([first, 6, first]), said, never)
    assert state.place.any(1).tolist() == [True, False, True]
    for row, words in enumerate(([first], [], [first])):
        torch.testing.assert_close(state.memory[row : row + 1], remembered(net, words))
        assert state.place[row : row + 1].equal(placed(model.ngram, words))  # type: ignore[arg-type]
    search.remember(state, torch.tensor([8, 8, 8]), never, rests)
    for row, words in enumerate(([first], [], [])):
        torch.testing.assert_close(state.memory[row : row + 1], remembered(net, words))
        assert state.place[row : row + 1].equal(placed(model.ngram, words))  # type: ignore[arg-type]


def test_what_a_search_is_not_for(model: Model) -> None:
    with pytest.raises(UsageError, match="write only"):
        Engine(model, CHAT, 1, sampling=Sampling(beam=2))
    with pytest.raises(UsageError, match="no n-grams"):
        Engine(replace(model, ngram=None), ASR_3, 1, sampling=Sampling(beam=2, lm_weight=1.0))
    with pytest.raises(UsageError, match="at least one"):
        Sampling(beam=0)
    for beam, shifts in ((1, 2), (2, 0)):
        with pytest.raises(UsageError, match="heard once, or more often"):
            Sampling(beam=beam, shifts=shifts)
    with pytest.raises(UsageError, match="no temperature"):
        hearing_sampling(model.config, 0.5, beam=2)
    task = Task("both", Role.SAMPLED, Role.SAMPLED)
    with pytest.raises(UsageError, match="write only"):
        Engine(model, task, 1, sampling=Sampling(beam=2))


def test_a_model_says_how_it_searches(model: Model, tiny_text: Text, tmp_path: Path) -> None:
    usual = Sampling(
        0, 250, 0, 25, guide_text=False, beam=3, lm_weight=0.25, token_bonus=0.5, shifts=2
    )  # fmt: skip
    files = {"lm_file": "m.safetensors", "mimi_file": "mimi.safetensors", "text_file": "text.model"}
    config = replace(
        model.config, samplings={"asr": usual}, ngram_file="ngram.safetensors", **files
    )  # type: ignore[arg-type]
    weights.save(replace(model, text=tiny_text, config=config), tmp_path)
    again = weights.load(tmp_path, device="cpu")
    assert again.config.samplings == {"asr": usual}
    assert isinstance(again.ngram, NGram) and again.ngram.order == 3
    count(ROWS, 4, 20).save(tmp_path / "mine")
    facts = tmp_path / "config.json"
    whole, mine = facts.read_text(), str(tmp_path / "mine")
    for own in ("ngram.safetensors", None):
        facts.write_text(json.dumps(json.loads(whole) | {"ngram_name": own}))
        more = weights.load(tmp_path, device="cpu", more_ngrams=mine)
        assert more.ngram is not None and more.ngram.context == 3
        assert (more.ngram.beside is None) == (own is None)
        assert more.config.ngram_file == (own or "mine")
        assert more.revision != again.revision
    facts.write_text(whole)
    assert hearing_sampling(again.config) == usual
    drawn = hearing_sampling(again.config, 0.5)
    assert (drawn.beam, drawn.shifts) == (1, 1)
    assert hearing_sampling(again.config, beam=1, lm_weight=0.0).lm_weight == 0
    assert [hearing_sampling(again.config, beam=beam).shifts for beam in (1, 2)] == [1, 2]
    assert hearing_sampling(again.config, shifts=4).shifts == 4
    without = hearing_sampling(replace(again.config, ngram_file=None))
    assert (without.beam, without.lm_weight, without.token_bonus) == (3, 0, 0)
    found = transcribe(again, torch.rand(9 * FRAME) - 0.5)
    assert found.audio_s == pytest.approx(9 * 0.08)
    (tmp_path / "ngram.safetensors").unlink()
    with pytest.raises(ModelError, match="ngram"):
        weights.load(tmp_path, device="cpu")
    data = MOSHI_NANO.to_kyutai()
    assert not {"ngram_name", "beam_size"} & {*data, *data["lm_gen_config"]}


@pytest.mark.parametrize("shifts", [1, 2])
def test_states_follow_their_hypotheses_in_a_graph_as_well(
    model: Model, tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifts: int
) -> None:
    wav = torch.rand(1, 1, 12 * FRAME) - 0.5
    assert model.ngram is not None
    model.ngram.recurrent = recurrent_model(288)
    give_words(model.ngram, tmp_path, tiny_text)
    sampling = Sampling(0, 0, 0, 0, beam=4, lm_weight=0.5, shifts=shifts)
    quick = texts(Engine(model, ASR_3, 1, sampling=sampling), wav, 0, HOLD + 4)
    monkeypatch.setattr(searching, "immediate", lambda tensor: False)
    assert texts(Engine(model, ASR_3, 1, sampling=sampling), wav, 0, HOLD + 4) == quick


@pytest.mark.parametrize("shifts", [1, 2])
def test_only_the_latest_keys_have_to_follow(
    model: Model, tiny_text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifts: int
) -> None:
    wide = replace(TINY_LM, temporal=replace(TINY_LM.temporal, context=40))
    lm = MoshiLm(wide).eval().requires_grad_(False)
    assert model.lm is not None
    lm.load_state_dict(model.lm.state_dict())
    model = replace(model, lm=lm)
    assert model.ngram is not None
    model.ngram.recurrent = recurrent_model(288)
    give_words(model.ngram, tmp_path, tiny_text)
    sampling = Sampling(0, 0, 0, 0, beam=4, lm_weight=0.3, shifts=shifts)
    wav = torch.rand(1, 1, 90 * FRAME) - 0.5
    quick = texts(Engine(model, ASR_3, 1, sampling=sampling), wav, 0, 0)
    moved = 0

    def follow(self: searching.Search, state: Any, parent: Tensor, clock: Tensor) -> None:
        nonlocal moved
        moved += int((parent != torch.arange(len(parent))).sum())
        mine = state.search
        for tensor in (mine.words, mine.past, mine.quiet, mine.memory, mine.place):
            tensor.copy_(tensor[parent])
        rows = torch.cat([parent + 4 * shift for shift in range(shifts)])  # of the one slot
        for tensor in (*state.lm.tensors().values(), state.ring.cells):
            tensor.copy_(tensor[rows])

    monkeypatch.setattr(searching.Search, "follow", follow)
    assert texts(Engine(model, ASR_3, 1, sampling=sampling), wav, 0, 0) == quick
    assert moved > 90
