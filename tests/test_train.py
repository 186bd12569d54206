"""The training loop on tiny models: it learns, resumes to the same numbers, stops and guards."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_LM, TINY_MIMI
from torch import Tensor, nn

from moshi_cli.core.config import ModelConfig
from moshi_cli.core.discriminators import DiscriminatorConfig
from moshi_cli.core.errors import InputError, ModelError, MoshiError
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.streams import ZERO
from moshi_cli.core.text import PAD, Text
from moshi_cli.core.weights import Model
from moshi_cli.tasks import optimizers, signals
from moshi_cli.tasks.cache import FRAME_HZ, Cache, Clip, Variant, write_cache
from moshi_cli.tasks.data import Pack, Windows
from moshi_cli.tasks.finetune import prepare
from moshi_cli.tasks.lm_objective import LmObjective, runs
from moshi_cli.tasks.objectives import CodecObjective
from moshi_cli.tasks.optimizers import orthogonalized
from moshi_cli.tasks.samples import Samples, worth_of
from moshi_cli.tasks.seeding import seed_embeddings
from moshi_cli.tasks.signals import stop_signals
from moshi_cli.tasks.spelling import UNKNOWN
from moshi_cli.tasks.stages import Casting, CodecStage, LmStage, Shape, Source, Stage
from moshi_cli.tasks.train import Run, checkpoints, read_tensors, train

FRAME = 1920
CRITICS = DiscriminatorConfig(windows=(256,), filters=2, strides=(4, 2), dilations=(1, 1))
LAGS = {"asr": 0.24, "tts": -0.16, "chat": 0.0}


def clip(kind: str, text: str, frames: int, **more: object) -> dict[str, object]:
    """A row without its place."""
    words = [[w, 0.1 + 0.3 * i, 0.3 + 0.3 * i] for i, w in enumerate(text.split())]
    return {"kind": kind, "text": text, "words": words, "samples": frames * FRAME - 100, **more}


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Ten seconds of tones with words, a teacher of 3 numbers a frame, and a noisy clip."""
    clips = [
        clip("question", "say one", 12, qa=0), clip("question", "say two", 12, qa=1),
        clip("moshi-answer", "one", 8, qa=0), clip("moshi-answer", "two", 9, qa=1),
        clip("noisy-world", "four", 20), clip("world", "three four two one", 24),
        clip("moshi-world", "hello sky", 15),
    ]  # fmt: skip
    folder, offset = tmp_path / "pack", 0
    folder.mkdir()
    with (folder / "index.jsonl").open("w") as index:
        for i, row in enumerate(clips):
            index.write(json.dumps({"id": f"c{i}", "offset_samples": offset, **row}) + "\n")
            samples = row["samples"]
            assert isinstance(samples, int)
            offset += -(-samples // FRAME) * FRAME
    time = np.arange(offset) / 24_000
    wave = np.sin(time * 1500 + 3 * np.sin(time * 9)) * (0.3 + 0.2 * np.sin(time * 5))
    (wave * 32767).astype(np.int16).tofile(folder / "pcm.i16")
    features = np.random.default_rng(0).standard_normal((offset // FRAME, 3))
    features.astype(np.float16).tofile(folder / "feat.f16")
    return folder


def codec_stage(pack: Path, **more: object) -> CodecStage:
    """Six steps through all phases of the codec's stage."""
    stage = CodecStage(
        name="codec", mix=(Source(str(pack)),), shapes=(Shape(0.32, 4), Shape(0.64, 2)), lr=1e-2,
        steps=6, warmup_steps=1, quantize_from=0.3, critics_from=0.5, critics_ramp=0.1,
        muon=0.02,
    )  # fmt: skip
    return replace(stage, **more)  # type: ignore[arg-type]


def codec_objective(stage: CodecStage) -> CodecObjective:
    """The same weights every time."""
    torch.manual_seed(0)
    mimi = Mimi(TINY_MIMI)
    mimi.init_weights(torch.Generator().manual_seed(0))
    return CodecObjective(stage, mimi, Windows(stage.mix), CRITICS)


def lm_objective(stage: LmStage, cache: Path, text: Text) -> LmObjective:
    """The same weights every time."""
    torch.manual_seed(0)
    samples = Samples(Cache(cache, 4), text, TINY_LM, stage.lag_s)
    return LmObjective(stage, MoshiLm(TINY_LM), samples)


@pytest.fixture
def cache(pack: Path, tiny_mimi: Mimi, tmp_path: Path) -> Path:
    """The pack as codes, one take per clip."""
    source = Pack(pack)
    jobs = [Clip(source, row, Variant(noise=0.5)) for row in source.rows]
    assert write_cache(tiny_mimi, jobs, tmp_path / "cache") == len(jobs)
    return tmp_path / "cache"


def lm_stage(cache: Path, **more: object) -> LmStage:
    """A short stage of all three tasks."""
    stage = LmStage(
        name="lm", mix=(Source(str(cache)),), shapes=(Shape(1.6, 6),), lag_s=LAGS, lr=1e-2,
        steps=6, warmup_steps=1, ema=0.9, hide=0.1, depth_share=0.7,
    )  # fmt: skip
    return replace(stage, **more)  # type: ignore[arg-type]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bitwise."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_codec_resumes_to_the_same_numbers(pack: Path, tmp_path: Path) -> None:
    stage = codec_stage(pack, steps=10)
    ends = []
    for name, parts in (("once", (10,)), ("twice", (5, 5))):
        for part in parts:
            objective = codec_objective(stage)
            summary = train(
                stage, objective, tmp_path / name, resume=True, stop_after=part, log_every=1
            )
        assert summary.progress == 1
        ends.append(summary.checkpoint)
    for file in ("mimi", "critics", "projection", "resume"):
        once, twice = (read_tensors(end / f"{file}.safetensors") for end in ends)
        assert same(once, twice), file
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("once", "twice")]
    rows = [[json.loads(line) for line in log.splitlines()] for log in logs]
    assert [r["mel"] for r in rows[0]] == [r["mel"] for r in rows[1]]
    assert "critics" in rows[0][-1]
    assert rows[0][-1]["commitment"] > 0


def test_lm_resumes_to_the_same_numbers(cache: Path, tiny_text: Text, tmp_path: Path) -> None:
    losses = {"text": 1.0, "letters": 1.0}
    stage = lm_stage(cache, steps=10, losses=losses, spelled_by=2)
    ends = []
    for name, parts in (("once", (10,)), ("twice", (5, 5))):
        for part in parts:
            objective = lm_objective(stage, cache, tiny_text)
            summary = train(stage, objective, tmp_path / name, resume=True, stop_after=part)
        ends.append(summary.checkpoint)
    for file in ("lm", "lm.ema", "speller", "resume"):
        once, twice = (read_tensors(end / f"{file}.safetensors") for end in ends)
        assert same(once, twice), file


def test_codec_learns(pack: Path, tmp_path: Path) -> None:
    stage = codec_stage(pack, steps=25, critics_from=1.0, quantize_from=0.9)
    train(stage, codec_objective(stage), tmp_path / "run", log_every=5)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["mel"] < 0.8 * rows[0]["mel"]


def test_a_deaf_voice_has_text_alone(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, hide=0.0, deaf=1.0)
    drawn = lm_objective(stage, cache, tiny_text).draw(0)
    seen = set()
    for batch in drawn.batches:
        for row, task in zip(batch.shifted.inputs, batch.names, strict=True):
            own, partner = ((row[rows] >= 0).any() for rows in (slice(1, 5), slice(5, 9)))
            assert (bool(own), bool(partner)) == (task == "asr", task == "chat")
            assert (row[0] > PAD).any()
            seen.add(task)
    assert len(seen) > 1
    odds = replace(stage, narrow=1.0, narrow_given=0.0, deaf=0.0)
    narrowed = lm_objective(odds, cache, tiny_text).draw(0).batches[0]
    for row, task in zip(narrowed.shifted.inputs, narrowed.names, strict=True):
        assert (row[1:5] >= 0).any(1).all() == (task == "asr") or (row[4] < 0).any()
        assert (row[1] >= 0).any()


def test_words_are_doubted_where_no_voice_is_made(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, hide=0.0, shapes=(Shape(8.0, 64),))
    plain, doubted = (
        lm_objective(replace(stage, doubt=p), cache, tiny_text).draw(0).batches[0]
        for p in (0.0, 0.8)
    )
    assert torch.equal(plain.shifted.targets, doubted.shifted.targets)
    assert torch.equal(plain.shifted.inputs[:, 1:], doubted.shifted.inputs[:, 1:])
    hears = torch.tensor([task == "asr" for task in plain.names])[:, None]
    told, seen = plain.shifted.inputs[:, 0], doubted.shifted.inputs[:, 0]
    words = hears & (told > PAD) & (told < TINY_LM.text_vocab)
    assert torch.equal(told[~words], seen[~words])
    assert 0.3 < float((seen[words] == ZERO).float().mean()) < 0.5
    assert 0.3 < float(((seen[words] > PAD) & (seen[words] != told[words])).float().mean()) < 0.5
    alone = plain.shifted.inputs.clone()
    alone[:, 1:] = ZERO  # text without a voice to hear
    hide = torch.zeros_like(alone, dtype=torch.bool)
    sure = lm_objective(replace(stage, doubt=1.0), cache, tiny_text)
    kept = sure.doubted(replace(plain.shifted, inputs=alone), hide, torch.Generator())
    assert torch.equal(kept, alone)
    assert not hide.any()


def test_gaps_are_in_what_is_heard(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, hide=0.0, shapes=(Shape(8.0, 16),))
    plain, gappy = (
        lm_objective(replace(stage, gaps=p), cache, tiny_text).draw(0).batches[0]
        for p in (0.0, 0.4)
    )
    for row, task in enumerate(plain.names):
        told, seen = plain.shifted.inputs[row], gappy.shifted.inputs[row]
        heard = {"asr": slice(1, 5), "chat": slice(5, 9), "tts": slice(0, 0)}[task]
        lost = (told != seen).any(0)
        assert torch.equal(told[:, ~lost], seen[:, ~lost])
        assert (seen[heard][:, lost] == ZERO).all()  # all codes of a frame at once
        rest = torch.ones(len(told), dtype=torch.bool)
        rest[heard] = False
        assert torch.equal(told[rest], seen[rest])
        assert bool(lost.any()) == (task != "tts")


def test_gaps_cover_what_was_asked_for() -> None:
    inside = runs(64, 1000, 0.2, torch.Generator().manual_seed(0))
    assert 0.18 < float(inside.float().mean()) < 0.22
    alone = inside[:, 1:-1] & ~inside[:, :-2] & ~inside[:, 2:]
    assert not alone.any()


def test_layers_drop_out_where_no_voice_is_made(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, shapes=(Shape(8.0, 12),), dropout=0.5)
    objective = lm_objective(stage, cache, tiny_text)
    batch = objective.draw(0).batches[0]
    s = batch.shifted
    with torch.no_grad():
        plain, _ = objective.lm.temporal(s.inputs)
        with objective.dropped(s, 0, 0):
            thin, _ = objective.lm.temporal(s.inputs)
        with objective.dropped(s, 0, 0):
            again, _ = objective.lm.temporal(s.inputs)
    assert torch.equal(thin, again)
    changed = [not torch.equal(a, b) for a, b in zip(plain, thin, strict=True)]
    assert changed == [task == "asr" for task in batch.names]
    assert True in changed and False in changed


def test_a_step_with_dropout_is_the_same_in_parts(cache: Path, tiny_text: Text) -> None:
    losses = []
    for batch, accumulate in ((8, 1), (2, 4)):
        stage = lm_stage(cache, shapes=(Shape(4.0, batch),), dropout=0.3)
        objective = lm_objective(replace(stage, accumulate=accumulate), cache, tiny_text)
        torch.manual_seed(0)
        losses.append(objective.backward(0, 0.0)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_untold_voice_has_sound_alone(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, hide=0.0, untold=1.0, losses={"text": 1.0, "letters": 1.0})
    objective = lm_objective(replace(stage, spelled_by=2), cache, tiny_text)
    for batch in objective.draw(0).batches:
        assert batch.letters is not None
        for s, task in enumerate(batch.names):
            row = batch.shifted.inputs[s]
            told = bool((row[0, 1:] > PAD).any())
            assert row[0, 0] == TINY_LM.text_vocab  # as the half of guidance reads it
            assert told == bool(batch.shifted.mask[s, 0].any()) == (task == "asr")
            assert (row[1:5] >= 0).any()
            assert (batch.letters[s, 2:] == UNKNOWN).all()
            assert (batch.letters[s, :2] > 0).any() == (task != "tts")
    deaf = lm_objective(replace(stage, deaf=1.0, spelled_by=2), cache, tiny_text).draw(0)
    assert all((row[0, 1:] > PAD).any() for batch in deaf.batches for row in batch.shifted.inputs)


def test_other_voices_speak_too(cache: Path, tiny_text: Text) -> None:
    g = torch.Generator().manual_seed(0)
    for others, heard in ((0.0, ()), (1.0, ()), (1.0, ("world",))):
        casting = Casting(others=others, heard=heard)
        samples = Samples(Cache(cache, 4), tiny_text, TINY_LM, LAGS, casting)
        takes = samples.heard + samples.other if others else samples.own
        known = {w for take in takes for w, _, _ in take.words}
        spelled = {word: samples.spelling.classes_of(word) for word in known | {"three"}}
        grid, _, given, spoken, _ = samples.grid("tts", 400, g)
        assert given is None
        assert spoken
        assert {w for w, _, _ in spoken} <= set(spelled.values())
        assert ("three" in known) == bool(others)  # of the clip that is heard
        assert not others or spelled["three"] in [w for w, _, _ in spoken]
        assert set(tiny_text.decode(grid[0]).split()) <= known


def test_words_count_by_what_they_are_worth(cache: Path, tiny_text: Text) -> None:
    samples = Samples(Cache(cache, 4), tiny_text, TINY_LM, LAGS, Casting(wait=0.0, chatter=0.0))
    (take,) = [t for t in samples.own if t.text == "hello sky"]
    first, second = (int(s * FRAME_HZ) for _, s, _ in take.words)
    weighed = replace(take, worth=(0.5, -0.25))
    expected = [1.0] * first + [0.5] * (second - first) + [-0.25] * (take.frames - second)
    assert worth_of(weighed).tolist() == expected
    samples.own = [weighed]
    batch = samples.batch({"tts": 1, "asr": 1}, take.frames, 8, torch.Generator().manual_seed(0))
    worth = batch.shifted.worth
    assert worth is not None and worth.shape == batch.shifted.mask.shape
    for row, name in enumerate(batch.names):
        assert (worth[row, 0] == 1).all()
        for k in range(1, 5) if name == "tts" else ():
            late = 2 + TINY_LM.delays[k]  # the voice trails the text by two frames
            assert worth[row, k, late:].tolist() == expected[: take.frames - late]
    for takes in samples.answers.values():
        takes[:] = [replace(t, worth=(-0.5,)) for t in takes]
    grid, _, _, _, worth = samples.grid("chat", 60, torch.Generator().manual_seed(0))
    assert sorted(set(worth.tolist())) == [-0.5, 1.0]
    assert samples.batch({"asr": 1}, 20, 2, torch.Generator()).shifted.worth is None
    assert len(grid[0]) == len(worth)


def test_letters_need_a_layer_that_is_there(cache: Path, tiny_text: Text) -> None:
    stage = lm_stage(cache, losses={"letters": 1.0}, spelled_by=3)
    with pytest.raises(MoshiError, match="spelled_by is 3, the model has 2 layers"):
        lm_objective(stage, cache, tiny_text)


def test_lm_learns_every_task(cache: Path, tiny_text: Text, tmp_path: Path) -> None:
    stage = lm_stage(cache, steps=30, spelled_by=1)
    stage = replace(stage, losses=stage.losses | {"letters": 1.0})
    train(stage, lm_objective(stage, cache, tiny_text), tmp_path / "run", log_every=5)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for key in ("text", "semantic", "acoustic", "letters"):
        assert rows[-1][key] < 0.95 * rows[0][key], key


def test_frozen_parts_stay(pack: Path, tmp_path: Path) -> None:
    freeze = ("mimi.encoder*", "mimi.downsample*", "mimi.quantizer*")
    first = codec_stage(pack, critics_from=1.0)
    done = train(first, codec_objective(first), tmp_path / "codes")
    before = read_tensors(done.checkpoint / "mimi.safetensors")
    losses = first.losses | {"distillation": 0.0}
    stage = codec_stage(pack, critics_from=0.0, freeze=freeze, steps=2, losses=losses)
    objective = codec_objective(stage)
    objective.mimi.load_state_dict(before)
    objective.mimi.quantizer.refresh()
    after = train(stage, objective, tmp_path / "decoder").checkpoint
    for key, value in read_tensors(after / "mimi.safetensors").items():
        fixed = key.startswith(("encoder", "downsample", "quantizer"))
        if fixed:
            assert torch.equal(value, before[key]), key
    assert not same(before, read_tensors(after / "mimi.safetensors"))


def test_an_encoder_does_not_leave_its_codebooks_behind(pack: Path) -> None:
    stage = codec_stage(pack, freeze=("mimi.quantizer*",))
    with pytest.raises(MoshiError, match="would leave its frozen codebooks behind"):
        codec_objective(stage)
    codec_objective(codec_stage(pack, freeze=("mimi.quantizer.*_proj*",)))
    whole = codec_stage(pack, freeze=("mimi.quantizer*", "mimi.encoder*", "mimi.down*"))
    with pytest.raises(MoshiError, match="the encoder is frozen; distillation, recognition"):
        codec_objective(whole)
    codec_objective(replace(whole, losses=whole.losses | {"distillation": 0.0}))


class Toy:
    """A parameter that goes to zero; step `bad` has no number."""

    def __init__(self, bad: tuple[int, ...] = (), then: int | None = None):
        self.modules: dict[str, nn.Module] = {"toy": nn.Linear(2, 2)}
        self.bad, self.then = bad, then

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def restored(self, tensors: dict[str, Tensor]) -> None:
        assert tensors == {}

    def backward(self, step: int, progress: float) -> dict[str, float]:
        loss = sum(p.square().sum() for p in self.modules["toy"].parameters())
        assert isinstance(loss, Tensor)
        loss.backward()
        if step == self.then:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": math.nan if step in self.bad else loss.item()}


TOY = Stage(name="toy", mix=(), losses={}, steps=8, warmup_steps=1)


def test_a_step_without_numbers_changes_nothing() -> None:
    run = Run(TOY, Toy(bad=(1,)))
    run.advance()
    before = {n: p.detach().clone() for n, p in run.names.items()}
    assert run.advance()["skipped"] == 1
    assert same(before, run.names)
    run.advance()
    assert not same(before, run.names)


def test_many_of_them_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(MoshiError, match="no finite numbers"):
        train(replace(TOY, steps=99), Toy(bad=tuple(range(99))), tmp_path)


def test_sigterm_saves_and_stops(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    summary = train(TOY, Toy(then=2), tmp_path)
    assert (summary.step, summary.interrupted) == (3, True)
    assert summary.checkpoint == checkpoints(tmp_path)[-1]
    assert signal.getsignal(signal.SIGTERM) is before
    assert train(TOY, Toy(), tmp_path, resume=True).step == 8


@pytest.mark.parametrize("relayed", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_passed_on_is_one_wish(relayed: signal.Signals) -> None:
    """As torchrun does with what its workers have had from the terminal."""
    with stop_signals() as stop:
        for number in (signal.SIGINT, relayed, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.is_set()


def test_a_later_signal_acts_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])

    def impatient() -> None:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += signals.SAME_WISH_S
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            impatient()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_last_checkpoints_are_kept_and_others_refused(tmp_path: Path) -> None:
    for _ in range(4):
        train(TOY, Toy(), tmp_path, resume=True, stop_after=1, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    with pytest.raises(MoshiError, match="already holds a run"):
        train(TOY, Toy(), tmp_path)
    with pytest.raises(MoshiError, match="belongs to stage toy"):
        train(replace(TOY, name="other"), Toy(), tmp_path, resume=True)


def test_the_budget_is_steps_or_minutes_whichever_is_tighter() -> None:
    run = Run(replace(TOY, minutes=2.0, warmup_steps=0), Toy())
    run.step, run.elapsed_s = 2, 90.0
    assert run.progress == 0.75
    assert math.isclose(run.rate(), 0.02 + 0.98 * (1 + math.cos(0.75 * math.pi)) / 2)
    run.step = 7
    assert run.progress == 7 / 8


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(MoshiError, match="nothing is left"):
        Run(replace(TOY, freeze=("toy.*",)), Toy())


@pytest.mark.parametrize("quick", [True, False])
def test_orthogonalized_has_even_singular_values(
    quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "bf16_kernels", lambda device: quick)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(3, 12, 7), 5))
    assert values.shape == (3, 7)
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_windows_leave_out_what_the_source_skips(pack: Path) -> None:
    windows = Windows([Source(str(pack))])
    assert [n for _, n in windows.runs[0]] == [41, 39]  # before and after the noisy clip
    g = torch.Generator().manual_seed(3)
    batch = windows.draw(8, 5, g, (-6.0, 6.0), tries=2)
    assert batch.wav.shape == (5, 1, 8 * FRAME)
    assert batch.features is not None
    assert batch.features.shape == (5, 8, 3)
    again = windows.draw(8, 5, torch.Generator().manual_seed(3), (-6.0, 6.0), tries=2)
    assert torch.equal(batch.wav, again.wav)
    with pytest.raises(InputError, match="no stretch of 60 frames"):
        windows.draw(60, 1, g)


@pytest.mark.parametrize(
    ("line", "said"), [("{", "not a row"), ('{"id": 1, "kind": "x"}', "not a row")]
)
def test_a_broken_pack_names_the_line(pack: Path, line: str, said: str) -> None:
    with (pack / "index.jsonl").open("a") as index:
        index.write(line + "\n")
    with pytest.raises(InputError, match=f"index.jsonl:8: {said}"):
        Pack(pack)


def test_clips_beyond_the_samples_are_refused(pack: Path) -> None:
    (pack / "pcm.i16").write_bytes((pack / "pcm.i16").read_bytes()[: 50 * FRAME])
    with pytest.raises(InputError, match="does not lie in"):
        Pack(pack)


def test_a_cache_goes_on_where_it_stopped(pack: Path, tiny_mimi: Mimi, tmp_path: Path) -> None:
    source, folder = Pack(pack), tmp_path / "parts"
    jobs = [Clip(source, row, Variant(noise=0.5, gain_db=(-9.0, 3.0))) for row in source.rows]
    write_cache(tiny_mimi, jobs[:3], folder)
    (folder / "codes.i16").write_bytes((folder / "codes.i16").read_bytes() + b"torn")
    write_cache(tiny_mimi, jobs, folder)
    write_cache(tiny_mimi, jobs, tmp_path / "whole")
    for name in ("codes.i16", "index.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_samples_put_words_and_voices_in_their_streams(cache: Path, tiny_text: Text) -> None:
    samples = Samples(Cache(cache, 4), tiny_text, TINY_LM, LAGS, Casting(wait=0.0, chatter=0.0))
    g = torch.Generator().manual_seed(0)
    asr, tts, chat = (samples.grid(name, 40, g)[0] for name in ("asr", "tts", "chat"))
    for grid in (asr, tts, chat):
        assert grid.shape == (9, 40)
        assert (grid[0] > PAD).any()
    assert (asr[5:] == ZERO).all()
    assert (asr[1:5] >= 0).all()
    said = {w for t in samples.own for w, _, _ in t.words}
    assert set(tiny_text.decode(tts[0]).split()) <= said
    assert (chat[5:] >= 0).sum() > 0
    batch = samples.batch({"asr": 1, "tts": 1, "chat": 1}, 30, 12, g)
    assert batch.shifted.inputs.shape == (12, 9, 30)
    for row, name in enumerate(batch.names):
        wanted = batch.shifted.mask[row]
        assert wanted[0].any()
        assert wanted[1:5].any() == (name != "asr")
        assert not wanted[5:].any()
        assert batch.lags[row] == {"asr": "3", "tts": "-2", "chat": "0"}[name]


def test_an_answer_breaks_off_when_the_partner_speaks_into_it(cache: Path, tiny_text: Text) -> None:
    calm = Casting(wait=0.0, chatter=0.0, hiss=0.0)
    said = {}
    for name, casting in (
        ("calm", calm),
        ("rude", replace(calm, interrupt=1.0, stop_s=(0.0, 0.0))),
    ):
        samples = Samples(Cache(cache, 4), tiny_text, TINY_LM, LAGS, casting)
        for qa, takes in samples.answers.items():
            words = (("one", 0.0, 0.1), ("sky", 0.6, 0.64))  # spoken into 0.34 s after its start
            samples.answers[qa] = [replace(take, words=words, frames=8) for take in takes]
        quiet, sounds, texts = samples.quiet(120), 0, []
        for i in range(8):
            grid = samples.dialogue(120, torch.Generator().manual_seed(i))[0]
            texts += tiny_text.decode(grid[0]).split()
            sounds += int((grid[1:5] != quiet).any(0).sum())
        said[name] = texts.count("one"), texts.count("sky"), sounds
    one, sky, sounds = said["calm"]
    assert one > 8 and one - sky <= 8 and sounds > 7 * sky  # a window may end within an answer
    one, sky, sounds = said["rude"]
    assert one > said["calm"][0] and sky == 0 and sounds < 6 * one  # the end is never said
    samples.casting = replace(casting, gap_s=(1.5, 1.5))
    for frames in range(8, 90):  # an interruption may lie beyond the window's end
        assert samples.dialogue(frames, torch.Generator().manual_seed(0))[0].shape[1] == frames


def test_a_task_learns_at_several_lags(cache: Path, tiny_text: Text) -> None:
    others = {"asr": (0.0, 0.48)}
    samples = Samples(Cache(cache, 4), tiny_text, TINY_LM, LAGS, None, others)
    batch = samples.batch({"asr": 1, "tts": 1}, 30, 64, torch.Generator().manual_seed(0))
    asr = [lag for lag, name in zip(batch.lags, batch.names, strict=True) if name == "asr"]
    assert {"0", "3", "6"} == set(asr) and len(asr) / 3 < asr.count("3") < len(asr) * 2 / 3
    assert {lag for lag, name in zip(batch.lags, batch.names, strict=True) if name == "tts"} == {
        "-2"
    }
    text = torch.where(batch.shifted.mask[:, 0], batch.shifted.targets[:, 0], PAD)
    words: dict[str | None, list[int]] = {}
    for row, (lag, name) in enumerate(zip(batch.lags, batch.names, strict=True)):
        if name == "asr":  # the later the text, the later its first word can be
            first = int((text[row] > PAD).nonzero()[0, 0])
            words.setdefault(lag, []).append(first)
    assert min(words["0"]) < min(words["3"]) < min(words["6"])


def test_a_lag_that_no_condition_names_is_refused(
    tiny_mimi: Mimi, tiny_lm: MoshiLm, cache: Path
) -> None:
    model = Model(tiny_mimi, tiny_lm, None, ModelConfig(lm=TINY_LM), "tiny")
    with pytest.raises(ModelError, match="cannot be told the lag of 'asr', 25 frames"):
        prepare(lm_stage(cache, other_lags_s={"asr": (2.0,)}), model)


@pytest.mark.parametrize("low_rank", [0, 24])
def test_a_seeded_model_hears_the_quantised_latent(tiny_mimi: Mimi, low_rank: int) -> None:
    tiny_lm = MoshiLm(replace(TINY_LM, low_rank=low_rank or None)).requires_grad_(False)
    start = tiny_lm.emb[:, -1].clone()
    seed_embeddings(tiny_lm, tiny_mimi, torch.Generator().manual_seed(0))
    Q, T = TINY_LM.voice_q, 400
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(TINY_LM.codebook_size, (1, Q, T), generator=g)
    rows = torch.full((2, TINY_LM.streams, T), -1)
    rows[0, 1 : 1 + Q] = rows[1, 1 + Q :] = codes[0]
    voice, partner = tiny_lm.embed(rows)  # [T, D]
    torch.testing.assert_close(voice, partner)
    latent = tiny_mimi.quantizer.decode(codes)[0].T  # [T, L]
    given = torch.cat([latent, torch.ones(T, 1)], 1)
    told = given @ torch.linalg.lstsq(given, voice).solution  # a straight line leads there
    torch.testing.assert_close(told, voice, rtol=0, atol=1e-3)
    assert 0.3 < voice.square().mean() < 3
    assert torch.equal(start, tiny_lm.emb[:, -1])
    torch.testing.assert_close(tiny_lm.text_emb.table.square().mean(), torch.tensor(1.0))
