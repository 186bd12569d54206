"""From alignments to samples: token rows, lines of recordings, excerpts, what learns from them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_LM
from test_manifest import stereo, tone, write
from torch import Tensor

from moshi_cli.core import audio
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import lm_loss
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import ZERO, DelayPattern
from moshi_cli.core.text import EPAD, PAD, Text, align, timed_words
from moshi_cli.tasks import cache as takes
from moshi_cli.tasks.cache import Cache, write_cache
from moshi_cli.tasks.excerpts import TASKS, Excerpts
from moshi_cli.tasks.inspection import inspect_cache
from moshi_cli.tasks.manifest import MAIN, OTHER, Problem, Spoken, load_data
from moshi_cli.tasks.microphone import Microphone, hear
from moshi_cli.tasks.pieces import Piece, pieces
from moshi_cli.tasks.turns import Turn

# Words as tokens


def interleaved(words: list[tuple[str, float, float]], frames: int, text: Text) -> list[int]:
    """The published fine-tuning data's rule, word for word (moshi-finetune's interleaver)."""
    row, pending = [PAD] * frames, []
    left = sorted((w for w in words if w[2] > w[1] and w[1] >= 0), key=lambda w: w[1])
    for t in range(frames):
        while left and left[0][1] * 12.5 < t + 1:
            pending = text.encode(left.pop(0)[0].strip())  # what is unfinished is lost
        if pending:
            if t > 0 and row[t - 1] == PAD:
                row[t - 1] = EPAD
            row[t] = pending.pop(0)
    return row


def test_worked_examples(tiny_text: Text) -> None:
    (one,), (two,) = tiny_text.encode("one"), tiny_text.encode("two")
    many = tiny_text.encode("zyx")  # spelled in bytes
    assert len(many) > 2

    def row(*words: tuple[str, float, float], frames: int = 8) -> list[int]:
        found = align(words, frames, tiny_text, crowding="replace").tolist()
        assert found == interleaved(list(words), frames, tiny_text)
        return found

    E, P = EPAD, PAD
    assert row(("one", 0.24, 0.5)) == [P, P, E, one, P, P, P, P]  # EPAD takes the frame before
    assert row(("one", 0.0, 0.5)) == [one, P, P, P, P, P, P, P]  # no room for it at the start
    assert row(("one", 0.24, 0.3), ("two", 0.33, 0.4)) == [P, P, E, one, two, P, P, P]  # they touch
    assert row(("one", 0.24, 0.3), ("two", 0.41, 0.6)) == [P, P, E, one, E, two, P, P]
    assert row(("zyx", 0.16, 0.3), ("one", 0.33, 0.4))[1:5] == [E, *many[:2], one]  # pushed out
    assert row(("one", 0.24, 0.24), ("two", 0.5, 0.3)) == [P] * 8  # ends before it starts
    assert row(("one", 0.24, 0.5), ("two", 0.64, 0.9)) == [P, P, E, one, P, P, P, P]  # beyond
    assert row(("zyx", 0.56, 0.9))[6:] == [E, many[0]]  # cut at the end


def test_any_words_give_the_published_rows(tiny_text: Text) -> None:
    rng = random.Random(0)
    for _ in range(200):
        words, at = [], 0.0
        for _ in range(rng.randint(0, 9)):
            at += rng.choice([0.0, 0.013, 0.3, 0.7]) + rng.random() / 5
            words.append((rng.choice(["one", "hello", "zyx", "sky", "é"]), at, at + 0.2))
        expected = interleaved(words, 40, tiny_text)
        assert align(words, 40, tiny_text, crowding="replace").tolist() == expected
        # and back: with boundaries of their own, words come out at the frames they went in
        spaced = [(w, 0.08 * (6 * i + 2), 0.08 * (6 * i + 4)) for i, (w, _, _) in enumerate(words)]
        spaced = [w for w in spaced if w[0] != "zyx"]
        row = align(spaced, 80, tiny_text, crowding="space")
        back = [(w.text, round(w.start_s, 2)) for w in timed_words(row, tiny_text)]
        assert back == [(w, round(s, 2)) for w, s, _ in spaced]


@pytest.mark.parametrize("lag", [-3, -1, 0, 2, 5])
def test_a_lag_moves_text_against_the_voice(lag: int, tiny_text: Text) -> None:
    """The published way to train a TTS shifts words by the audio's delay; ours delays streams."""
    words = [("one", 0.83, 1.0), ("two", 1.23, 1.5), ("hello", 2.03, 2.3)]
    grid = torch.full((1, 9, 40), ZERO)
    grid[:, 0] = align(words, 40, tiny_text, crowding="replace")
    grid[:, 1] = torch.arange(40) % 16
    pattern = DelayPattern.of(replace(TASKS["speech"], lag_s=lag * 0.08), TINY_LM)
    assert pattern.delays[:2] == (max(lag, 0), max(-lag, 0))
    shifted = pattern.shift(grid)
    moved = [(w, s + lag * 0.08, e + lag * 0.08) for w, s, e in words]
    expected = interleaved(moved, 40, tiny_text)
    for step in range(12, 40):  # column step + 1 pairs frame f of the voice with the moved text
        f = step - max(-lag, 0)
        assert shifted.targets[0, 1, step] == f % 16
        assert shifted.targets[0, 0, step] == expected[f]


# Lines


def test_stereo_is_an_own_voice_and_a_partner(tmp_path: Path) -> None:
    words = [["hi", [0.2, 0.4], MAIN], ["you", [1.2, 1.4], OTHER], ["bye", [2.2, 2.4], MAIN]]
    stereo(tmp_path, "a", tone(3), tone(3, 500), words)
    write(tmp_path, [{"path": "a.wav", "duration": 3.0}])
    jobs = list(pieces(load_data([tmp_path]).recordings, piece_s=1.0))
    assert [(j.layout, j.start_s, j.duration_s) for j in jobs] == [
        ("stereo", 0, 1), ("stereo", 1, 1), ("stereo", 2, 1),
    ]  # fmt: skip
    g = torch.Generator().manual_seed(0)
    whole = audio.read(tmp_path / "a.wav", channel="separate")
    found = [j.sound(g, 24_000) for j in jobs]
    assert torch.equal(torch.cat([f[0] for f in found], 1), whole)
    assert found[0][1] == (("hi", 0.2, 0.4),)
    assert [round(f[2][0][1], 3) for f in found if f[2]] == [0.2]
    assert [j.row.id for j in jobs] == ["a", "a@1", "a@2"]
    rest = list(pieces(load_data([tmp_path]).recordings, piece_s=2.5))
    assert [j.duration_s for j in rest] == [3.0]  # a short rest joins the piece before it


def test_turns_are_a_speaker_and_the_rest(tmp_path: Path) -> None:
    a, b = tone(1.0, 200), tone(1.5, 500)
    audio.write(tmp_path / "a.wav", torch.cat([a, b, a]))
    row = {
        "path": "a.wav", "duration": 3.5,
        "turns": [["x", 0, 1], ["y", 1, 2.5], ["x", 2.5, 3.5]],
        "words": [["one", 0.3, 0.6], ["two", 1.3, 1.6], ["three", 2.9, 3.2]],
    }  # fmt: skip
    write(tmp_path, [row])
    first, second = pieces(load_data([tmp_path]).recordings, variants=2)
    g = torch.Generator().manual_seed(0)
    for job, words in ((first, ["one", "three"]), (second, ["two"])):
        lines, own, others = job.sound(g, 24_000)  # type: ignore[misc]
        assert torch.allclose(lines.sum(0), audio.read(tmp_path / "a.wav")[0])
        assert [w for w, _, _ in own] == words
        assert len(own) + len(others) == 3
        loud = lines[0].unfold(0, 1000, 1000).square().mean(1) > 1e-4
        spans = [(0, 1), (2.5, 3.5)] if job is first else [(1, 2.5)]
        inside = sum(round(24 * (e - s)) for s, e in spans)
        assert abs(int(loud.sum()) - inside) <= 2
    labelled = [Spoken("p", 0.1, 0.2, "y"), Spoken("q", 0.3, 0.4, "x")]
    job = replace(first, recording=replace(first.recording, words=tuple(labelled)))
    assert [w for w, _, _ in job.sound(g, 24_000)[1]] == ["q"]  # names win over times


def test_the_microphone_changes_the_partner_alone() -> None:
    own, partner = tone(2).numpy(), tone(2, 500).numpy()
    rng = np.random.default_rng(0)
    off = Microphone(gain_share=0, noise_share=0, echo_share=0)
    assert np.array_equal(hear(partner, own, off, rng), partner)
    echo = replace(off, echo_share=1.0, echo_scale=(0.2, 0.2), echo_s=(0.25, 0.25))
    heard = hear(np.zeros_like(own), own, replace(echo, room_share=(0.0, 0.0)), rng)
    assert np.allclose(heard[6000:], 0.2 * own[:-6000], atol=1e-5)
    assert np.abs(heard[:6000]).max() < 1e-6
    noisy = replace(off, noise_share=1.0, noise_db=(-10.0, -10.0), calm_share=0.0)
    noise = hear(partner, own, noisy, rng) - partner
    assert abs(10 * np.log10((noise**2).mean() / (partner**2).mean()) + 10) < 0.5
    loud = hear(partner, None, replace(off, gain_share=1.0, gain_db=(15.0, 15.0)), rng)
    assert 0.98 < np.abs(loud).max() <= 0.99


def test_pieces_are_heard_through_it(tmp_path: Path) -> None:
    stereo(tmp_path, "a", tone(2), tone(2, 500), [["hi", [0.2, 0.4], MAIN]])
    write(tmp_path, [{"path": "a.wav"}])
    always = Microphone(noise_share=1.0, calm_share=0.0)
    (job,) = pieces(load_data([tmp_path]).recordings, microphone=always)
    made = [job.sound(torch.Generator().manual_seed(s), 24_000)[0] for s in (1, 1, 2)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert torch.equal(made[2][0], audio.read(tmp_path / "a.wav", channel="left")[0])


# Caches


@pytest.fixture
def cache(tiny_mimi: Mimi, tmp_path: Path) -> Path:
    """Two conversations of 2.4 and 3.2 s as two-line takes."""
    for name, seconds in (("a", 2.4), ("b", 3.2)):
        words = [
            [w, [0.2 + 0.3 * i, 0.4 + 0.3 * i], MAIN if i % 3 else OTHER]
            for i, w in enumerate("hello to the sky one two three".split())
        ]
        noise = 0.2 * torch.randn(2, round(seconds * 24_000))
        stereo(tmp_path, name, noise[0], noise[1], words)
    write(tmp_path, [{"path": "a.wav", "duration": 2.4}, {"path": "b.wav", "duration": 3.2}])
    jobs = pieces(load_data([tmp_path]).recordings)
    assert write_cache(tiny_mimi, jobs, tmp_path / "cache") == 2
    return tmp_path / "cache"


def excerpts(cache: Path, text: Text, task: str, **more: object) -> Excerpts:
    """All takes, for a task."""
    codes = Cache(cache, 4)
    return Excerpts(codes.takes, codes, text, TINY_LM, TASKS[task], **more)  # type: ignore[arg-type]


def test_two_lines_come_back(cache: Path, tiny_mimi: Mimi, tmp_path: Path) -> None:
    codes = Cache(cache, 4)
    take = codes.takes[1]
    assert (take.id, take.lines, take.frames, take.end) == ("b", 2, 40, 60 + 80)
    whole = audio.read(tmp_path / "b.wav", channel="separate")
    direct = tiny_mimi.encode(whole[:, None])
    for line in (0, 1):
        assert torch.equal(codes.read(take, line=line), direct[line])
        assert torch.equal(codes.read(take, 10, 7, line), direct[line, :, 10:17])
        assert codes.read(take, 35, 20, line).shape == (4, 5)
    assert [w for w, _, _ in take.words] == ["to", "the", "one", "two"]
    assert [w for w, _, _ in take.partner_words] == ["hello", "sky", "three"]


def test_long_sound_is_encoded_as_a_stream(
    tiny_mimi: Mimi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takes, "CHUNK_FRAMES", 8)
    sound = 0.3 * torch.rand(2, 19 * 1920 - 700)
    codes = takes.encode_lines(tiny_mimi, sound)
    assert codes.shape == (2, 4, 19)
    assert (codes == tiny_mimi.encode(sound[:, None])).float().mean() > 0.98


def test_corrupt_caches_are_told_by_line(cache: Path) -> None:
    def wrong(codec: str = "") -> list[str]:
        return [str(p) for p in inspect_cache(cache, codec) if isinstance(p, Problem)]

    assert wrong() == []
    assert [text.rpartition(": ")[2] for text in wrong("00")] == ["the codes are of another codec"]
    flat = bytearray((cache / "codes.i16").read_bytes())
    flat[3] ^= 1
    (cache / "codes.i16").write_bytes(flat)
    assert wrong() == [f"{cache / 'index.jsonl'}:1: a: the codes are not those that were made"]
    (cache / "codes.i16").write_bytes(flat[:-8])
    assert wrong()[1].startswith(f"{cache / 'index.jsonl'}:2: b: ends at frame 140, codes.i16 has")
    with (cache / "index.jsonl").open("a") as index:
        index.write('{"id": "torn')
    assert "index.jsonl:3: not a row" in wrong()[2]
    with pytest.raises(InputError, match="has 4 codebooks, the model has 8"):
        Cache(cache, 8)


def test_caches_refuse_other_settings_and_mend_torn_rows(
    cache: Path, tiny_mimi: Mimi, tmp_path: Path
) -> None:
    before = (cache / "index.jsonl").read_bytes(), (cache / "codes.i16").read_bytes()
    (cache / "index.jsonl").write_bytes(before[0] + b'{"id": "torn')
    jobs = list(pieces(load_data([tmp_path]).recordings))
    write_cache(tiny_mimi, jobs, cache)
    assert before == ((cache / "index.jsonl").read_bytes(), (cache / "codes.i16").read_bytes())
    with pytest.raises(InputError, match="was made with seed 0, not 1"):
        write_cache(tiny_mimi, jobs, cache, seed=1)


def test_shards_are_one_cache(cache: Path, tiny_mimi: Mimi, tmp_path: Path) -> None:
    jobs = list(pieces(load_data([tmp_path]).recordings))
    for i in (0, 1):
        write_cache(tiny_mimi, jobs[i::2], tmp_path / "shards" / f"{i}")
    parts, whole = Cache(tmp_path / "shards", 4), Cache(cache, 4)
    assert [t.id for t in parts.takes] == [t.id for t in whole.takes]
    for a, b in zip(parts.takes, whole.takes, strict=True):
        assert torch.equal(parts.read(a, line=1), whole.read(b, line=1))


# Samples


def test_a_conversation_is_two_voices(cache: Path, tiny_text: Text) -> None:
    source = excerpts(cache, tiny_text, "chat")
    g = torch.Generator().manual_seed(0)
    assert source.seconds == 5.6
    short = source.grid(20, g)[0]
    assert (short >= 0).all()
    grid = source.grid(100, g)[0]  # longer than any take: nothing follows
    ends = (grid[1] >= 0).sum()
    assert ends in (30, 40)
    assert (grid[:, ends:] == ZERO).all()
    assert tiny_text.decode(grid[0].tolist()) == "to the one two"
    other = excerpts(cache, tiny_text, "chat", own="second").grid(100, g)[0]
    assert tiny_text.decode(other[0].tolist()) == "hello sky three"
    batch = source.batch(100, 3, g)
    assert batch.names == ["chat"] * 3
    mask = batch.shifted.mask
    assert mask[:, 0].any() and mask[:, 1:5].any() and not mask[:, 5:].any()
    assert not mask[:, :, 42:].any()


def test_single_streams_have_lags_of_both_signs(cache: Path, tiny_text: Text) -> None:
    source = excerpts(cache, tiny_text, "speech", lags_s=(-0.6, 0.6), own="either")
    batch = source.batch(30, 60, torch.Generator().manual_seed(0))
    assert {int(lag) for lag in batch.lags} == set(range(-7, 8))
    again = source.batch(30, 60, torch.Generator().manual_seed(0))
    assert torch.equal(batch.shifted.inputs, again.shifted.inputs)
    s = batch.shifted
    assert (s.inputs[:, 5:] == ZERO).all()  # nobody else is there
    for row, lag in enumerate(map(int, batch.lags)):
        late = max(lag, 0), max(-lag, 0)
        assert int(s.mask[row, 0].nonzero()[0]) == late[0]
        assert int(s.mask[row, 1].nonzero()[0]) == late[1]
    full = source.grid(300, torch.Generator().manual_seed(1))[0]
    assert (full[:5] >= 0).all()  # short takes follow each other


@pytest.mark.parametrize("task", ["speech", "asr", "tts", "chat"])
def test_gradients_reach_what_the_task_learns(task: str, cache: Path, tiny_text: Text) -> None:
    lm = MoshiLm(TINY_LM)
    lags = {"speech": (-0.3, 0.3), "asr": (0.24, 0.24), "tts": (-0.24, -0.24)}.get(task, (0.0, 0.0))
    source = excerpts(cache, tiny_text, task, lags_s=lags)
    batch = source.batch(40, 4, torch.Generator().manual_seed(0))
    losses = lm_loss(lm, batch.shifted)
    losses.total.backward()
    reached = {n for n, p in lm.named_parameters() if p.grad is not None and p.grad.any()}
    assert "text_linear.weight" in reached
    assert any(n.startswith("depth.") for n in reached) == (task != "asr")
    heard = lm.emb.grad
    assert isinstance(heard, Tensor)
    assert heard[4:].any() == (task == "chat")  # the partner's tables


def test_takes_of_one_line_are_no_conversation(tiny_text: Text, cache: Path) -> None:
    codes = Cache(cache, 4)
    single = [replace(take, lines=1) for take in codes.takes]
    with pytest.raises(InputError, match="has one line, chat needs two"):
        Excerpts(single, codes, tiny_text, TINY_LM, TASKS["chat"])
    with pytest.raises(InputError, match="no takes for speech"):
        Excerpts([], codes, tiny_text, TINY_LM, TASKS["speech"])
    with pytest.raises(UsageError, match="no line 'thrid'"):
        Excerpts(single, codes, tiny_text, TINY_LM, TASKS["asr"], own="thrid")


def test_turns_without_words_stay_silent(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", tone(2))
    (tmp_path / "a.json").write_text(json.dumps({"alignments": []}))
    write(tmp_path, [{"path": "a.wav", "turns": [["x", 0, 2]]}])
    (r,) = load_data([tmp_path], words=False).recordings
    r = replace(r, turns=(Turn("x", 5.0, 6.0),))
    lines, own, others = Piece(r, "turns", 0.0, 2.0).sound(torch.Generator(), 24_000)  # type: ignore[misc]
    assert not lines[0].any() and own == others == ()
