"""Windows of speech for a codec that listens: where words, teacher and sound end up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Invoke, invoke
from conftest import TINY_MIMI

from moshi_cli.core.config import ModelConfig, QuantizerConfig
from moshi_cli.core.errors import UsageError
from moshi_cli.core.losses import mel_filters
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import PAD, Text
from moshi_cli.core.vq import SplitVq
from moshi_cli.core.weights import Model, save
from moshi_cli.tasks import plans
from moshi_cli.tasks.augment import Augment, colored_noise, resample, spoil
from moshi_cli.tasks.cache import Cache, Hiss, write_cache
from moshi_cli.tasks.data import Pack, Row, Windows
from moshi_cli.tasks.objectives import CodecObjective
from moshi_cli.tasks.readout import Readout, aim
from moshi_cli.tasks.recogniser import Recogniser, late_loss
from moshi_cli.tasks.spelling import read_spelling
from moshi_cli.tasks.stages import CodecStage, Flow, Shape, Source
from moshi_cli.tasks.train import Run
from moshi_cli.tasks.utterances import UNKNOWN, SceneJob, Utterances

__all__ = ["invoke"]  # a fixture

FRAME, RATE = 1920, 24_000
PLAIN = Augment(
    speed_share=0.0, gain_db=(0.0, 0.0), noise_share=0.0, band_share=0.0, tilt_share=0.0,
    room_share=0.0,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips of one word each, sounding exactly while it is said, and one nobody wrote down."""
    pcm = np.zeros(60 * FRAME, np.int16)
    rows = []
    for i, (kind, word) in enumerate([("world", "one"), ("world", "two"), ("voices", None)]):
        first = i * 20 * FRAME
        start, end = first + 4800, first + 14_400  # 0.2 s to 0.6 s
        pcm[start:end] = 8000 * np.sign(np.sin(np.arange(end - start) / (3 + i)))
        words = [[word, 0.2, 0.6]] if word else []
        rows.append({"id": str(i), "kind": kind, "text": word or "", "words": words,
                     "samples": 20 * FRAME, "offset_samples": first})  # fmt: skip
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pcm.tofile(tmp_path / "pcm.i16")
    ramp = np.arange(60, dtype=np.float16)[:, None] + np.zeros((1, 3), np.float16) + 1
    ramp.tofile(tmp_path / "feat.f16")
    return tmp_path


def draws() -> np.random.Generator:
    return np.random.default_rng(0)


def loud(wav: np.ndarray, start_s: float, end_s: float) -> float:
    part = wav[round(start_s * RATE) : round(end_s * RATE)]
    return float(np.abs(part).mean()) if len(part) else 0.0


def test_words_lie_where_they_sound(folder: Path, tiny_text: Text) -> None:
    flow = Flow(odds={"voices": 0.0})
    utterances = Utterances([Source(str(folder))], tiny_text, flow, replace(PLAIN, speed_share=0.5))
    rng, seen = np.random.default_rng(0), 0
    for _ in range(12):
        scene = utterances.window(50, rng)
        assert scene.clean and not scene.unknown
        for _, start_s, end_s in scene.words:
            if start_s < 0 or end_s > 4:
                continue
            seen += 1
            assert loud(scene.wav, start_s + 0.01, end_s - 0.01) > 0.2
            assert loud(scene.wav, start_s - 0.1, start_s - 0.01) < 0.01
            assert end_s - start_s == pytest.approx(0.4, rel=0.2)
    assert seen > 15


def test_excerpts_are_words_in_a_row_cut_between_them(tmp_path: Path, tiny_text: Text) -> None:
    names, pcm = ["one", "two", "three", "four"], np.zeros(20 * FRAME, np.int16)
    words = [[name, 0.2 + 0.3 * i, 0.4 + 0.3 * i] for i, name in enumerate(names)]
    for i, (_, start_s, end_s) in enumerate(words):
        span = slice(round(start_s * RATE), round(end_s * RATE))
        pcm[span] = 4000 * (i + 1)  # so loud is this word
    row = {"id": "0", "kind": "world", "words": words, "samples": len(pcm), "offset_samples": 0}
    (tmp_path / "index.jsonl").write_text(json.dumps(row))
    pcm.tofile(tmp_path / "pcm.i16")
    flow = Flow(inside=0, tight=0, gap_s=(0.3, 0.3), excerpt=0.8)
    utterances = Utterances([Source(str(tmp_path))], tiny_text, flow, PLAIN)
    rng, lengths = np.random.default_rng(0), set()
    for _ in range(20):
        scene = utterances.window(100, rng)
        whole = [(names.index(w), s, e) for w, s, e in scene.words if e <= 8]
        for i, start_s, end_s in whole:
            inside = loud(scene.wav, start_s + 0.01, end_s - 0.01)
            assert inside == pytest.approx(4000 * (i + 1) / 32768, rel=0.01)
        spoken_s = sum(min(e, 8) - min(s, 8) for _, s, e in scene.words)
        assert (scene.wav != 0).sum() / RATE == pytest.approx(spoken_s, abs=0.01)
        run = 1
        for (i, *_), (j, *_) in pairwise(whole):
            lengths.add(run)
            run = run + 1 if j == i + 1 else 1
    assert lengths >= {1, 2, 3, 4}


def test_a_cut_clip_keeps_the_teachers_rows(folder: Path, tiny_text: Text) -> None:
    utterances = Utterances([Source(str(folder))], tiny_text, Flow(), PLAIN)
    pack = utterances.packs[0]
    features = np.zeros((30, 3), np.float32)
    utterances.teach(features, pack, pack.rows[0], 5 * FRAME, 1.0, 10 * FRAME, 4 * FRAME)
    assert features[5:15, 0].tolist() == list(range(5, 15))


def test_rows_of_starts_and_of_spans(folder: Path, tiny_text: Text) -> None:
    utterances = Utterances([Source(str(folder))], tiny_text, Flow(odds={"voices": 0.0}), PLAIN)
    scene = utterances.window(50, np.random.default_rng(1))
    words = [w for w in scene.words if w[1] >= 0 and w[2] < 4]
    starts, spans = utterances.row(scene), utterances.spans(scene)
    assert tiny_text.decode([t for t in starts.tolist() if t > PAD]).split()
    for word, start_s, end_s in words:
        first = int(start_s * 12.5)
        assert starts[first] == tiny_text.encode(word)[0]
        inside = spans[round(start_s * 12.5) : round(end_s * 12.5)].unique_consecutive()
        assert inside.tolist() == tiny_text.encode(word)
    assert ((spans == PAD) | (spans > PAD)).all()


def test_unknown_words_are_no_targets(folder: Path, tiny_text: Text) -> None:
    only = Utterances([Source(str(folder))], tiny_text, Flow(odds={"world": 0.0}, tight=1.0), PLAIN)
    scene = only.window(50, np.random.default_rng(0))
    first = scene.unknown[0][0]
    assert (only.row(scene)[first:] == UNKNOWN).all()
    assert (only.spans(scene)[first:] == UNKNOWN).all()


def test_the_teacher_follows_pace_and_place(folder: Path, tiny_text: Text) -> None:
    utterances = Utterances([Source(str(folder))], tiny_text, Flow(), PLAIN)
    features = np.zeros((30, 3), np.float32)
    pack = utterances.packs[0]
    utterances.teach(features, pack, pack.rows[0], 5 * FRAME, 1.0, 20 * FRAME)
    assert features[5:25, 0].tolist() == list(range(1, 21))
    assert (features[:5] == 0).all() and (features[25:] == 0).all()
    half = np.zeros((30, 3), np.float32)
    utterances.teach(half, pack, pack.rows[0], FRAME // 2, 2.0, 10 * FRAME)
    assert half[1:10, 0] == pytest.approx(np.arange(2.5, 19, 2))  # between its own frames


def test_same_generator_same_batch(folder: Path, tiny_text: Text) -> None:
    utterances = Utterances([Source(str(folder))], tiny_text)
    a, b = (utterances.draw(20, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a.wav, b.wav) and a.wav.shape == (3, 1, 20 * FRAME)
    assert a.text is not None and b.text is not None and torch.equal(a.text, b.text)
    assert a.wav.abs().max() <= 0.99


def test_spoiling_leaves_or_marks() -> None:
    rng = np.random.default_rng(0)
    wav = np.sin(np.arange(24_000) / 5).astype(np.float32)
    same, clean = spoil(wav, PLAIN, rng, RATE)
    assert clean and np.array_equal(same, wav)
    noisy, clean = spoil(wav, replace(PLAIN, noise_share=1.0, snr_db=(10.0, 10.0)), rng, RATE)
    assert not clean
    assert np.square(noisy - wav).mean() == pytest.approx(0.05, rel=0.02)  # 10 dB under 0.5
    line = replace(PLAIN, band_share=1.0, band_hz=(3000.0, 3000.0))
    hiss = rng.standard_normal(24_000).astype(np.float32)
    narrow = np.abs(np.fft.rfft(spoil(hiss, line, rng, RATE)[0])) ** 2
    assert narrow[4500:].sum() < 1e-3 * narrow[:2500].sum()
    assert colored_noise(1000, rng).std() == pytest.approx(1, rel=1e-4)
    assert len(resample(wav, 1.25)) == 19_200


def test_a_late_loss_looks_back() -> None:
    text = torch.tensor([[PAD, 7, PAD, UNKNOWN, PAD, PAD]])
    logits = torch.full((1, 6, 9), -20.0)
    logits[..., PAD] = 20.0
    logits[0, 3, 7], logits[0, 3, PAD] = 20.0, -20.0  # two frames after the word began
    loss, right = late_loss(logits, text, 2, 0.2)
    assert loss < 1e-3 and right == 1
    assert late_loss(logits, text, 1, 0.2)[1] == 0


def test_the_words_reach_the_encoder_through_one_codebook(folder: Path, tiny_text: Text) -> None:
    stage = CodecStage(
        name="codec", mix=(Source(str(folder)),), shapes=(Shape(1.6, 2),), steps=4, warmup_steps=1,
        quantize_from=0.0, quantize=1.0, critics_from=1.0, crop_s=0.32, hears_after=4,
        losses={"mel": 1.0, "recognition": 1.0, "pad": 0.2, "commitment": 1.0},
    )  # fmt: skip
    mimi = Mimi(TINY_MIMI)
    objective = CodecObjective(stage, mimi, Utterances([Source(str(folder))], tiny_text))
    metrics = Run(stage, objective).advance()
    assert metrics["recognition"] > 1 and "heard" in metrics and "during" in metrics
    listener = objective.modules["recogniser"]
    assert isinstance(listener, Recogniser)
    mimi.zero_grad()
    batch = objective.windows.draw(20, 2, torch.Generator().manual_seed(0))  # type: ignore[call-arg]
    out = mimi.bottleneck(batch.wav, generator=torch.Generator().manual_seed(0))
    assert batch.text is not None and batch.spans is not None
    listener.loss(out.semantic, batch.text, batch.spans, 0.2)[0].backward()
    assert mimi.encoder.layers[0].weight.grad.abs().sum() > 0
    assert mimi.quantizer.acoustic.input_proj.weight.grad is None


def test_windows_and_hiss_go_into_a_cache(folder: Path, tiny_mimi: Mimi, tmp_path: Path) -> None:
    scenes = Utterances([Source(str(folder))], None, Flow(odds={"voices": 0.0}))
    jobs = [
        SceneJob(scenes, 2.4, Row("window-0", "window", "", (), 0, 0)),
        Hiss(Row("hiss-0", "hiss", "", (), 0, 0), seconds=0.8),
    ]
    parts = [tmp_path / "a", tmp_path / "b"]
    for part in parts:
        write_cache(tiny_mimi, jobs, part)
    cache = Cache(parts, tiny_mimi.num_codebooks)
    assert [t.frames for t in cache.takes] == [30, 10, 30, 10]
    for take in cache.takes:
        assert all(0 <= s and e <= 2.4 for _, s, e in take.words)
    assert torch.equal(cache.read(cache.takes[0]), cache.read(cache.takes[2]))


PLAN = """
silence_s: 0.8
hisses: 1
takes: {world: [{count: 2, tail_s: [0.3, 0.6]}, {speed: [1.1, 1.2]}]}
windows: [{count: 3, seconds: 2.4, flow: {rest: 1.0, rest_s: [0.4, 0.5], odds: {voices: 0}}}]
"""


def test_a_plan_becomes_a_cache(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = plans.load(tmp_path / "plan.yaml")
    jobs = plans.jobs(plan, [Pack(folder)])
    kinds = [job.row.kind for job in jobs]
    assert kinds[:2] == ["silence", "hiss"]
    assert sorted(kinds[2:]) == ["window"] * 3 + ["world"] * 6  # nobody wrote `voices` down
    again = plans.jobs(plan, [Pack(folder)])
    assert [job.row.id for job in again] == [job.row.id for job in jobs]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hisss: 3", "plan.yaml:1: unknown key 'hisss'"),
        ("windows: [{count: 3, flow: {rests: 1}}]", "unknown key 'windows.0.flow.rests'"),
        ("takes: {world: 3}", "takes.world must be a list"),
    ],
)
def test_a_plan_that_cannot_be_meant(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(says)):
        plans.load(tmp_path / "plan.yaml")


def test_the_sounds_of_words_reach_the_encoder(folder: Path, tmp_path: Path) -> None:
    """Each half frame of a clip has a symbol, or is unknown; the codebooks are aimed at them."""
    words = {
        w for row in Utterances([Source(str(folder))], None).packs[0].rows for w, *_ in row.words
    }
    lexicon = tmp_path / "lexicon.tsv"
    lexicon.write_text("".join(f"{word}\t{word[0]}{word}\n" for word in words))
    spelling = read_spelling(str(lexicon))
    utterances = Utterances([Source(str(folder))], None, Flow(), PLAIN, spelling=spelling)
    scene = utterances.window(50, np.random.default_rng(0))
    letters = utterances.letters(scene)
    for start, end in scene.unknown:
        assert (letters[:, start:end] == UNKNOWN).all()
    known = letters[letters != UNKNOWN]
    assert known.numel() and set(known.tolist()) <= set(range(spelling.classes))
    stage = CodecStage(
        name="codec", mix=(Source(str(folder)),), shapes=(Shape(1.6, 2),), steps=4, warmup_steps=1,
        quantize_from=0.5, critics_from=1.0, lexicon=str(lexicon), fit_frames=2,
        losses={"letters": 1.0, "envelope": 1.0, "commitment": 1.0},
    )  # fmt: skip
    mimi = Mimi(TINY_MIMI)
    objective = CodecObjective(stage, mimi, utterances)
    run = Run(stage, objective)
    before = mimi.encoder.layers[0].weight.clone()
    metrics = [run.advance() for _ in range(4)]
    assert all(m["letters"] > 0 and 0 <= m["spelled"] <= 1 for m in metrics)
    assert not torch.equal(before, mimi.encoder.layers[0].weight)
    latents = torch.randn(200, mimi.config.seanet.dim)
    rows = objective.meanings(latents)
    assert rows is not None
    assert rows.shape == (2 * spelling.classes, mimi.config.seanet.dim)
    assert (latents @ rows.T).var(0).sum().item() == pytest.approx(1, rel=1e-4)


def test_shards_of_a_plan_are_the_whole_plan(
    folder: Path, tiny_mimi: Mimi, tmp_path: Path, invoke: Invoke
) -> None:
    Path("plan.yaml").write_text(PLAN)
    save(Model(tiny_mimi, None, None, ModelConfig(mimi=tiny_mimi.config), "tiny"), Path("model"))
    for shard in ("1/2", "2/2", "1/2"):  # the third finds nothing left to do
        args = ["--plan", "plan.yaml", "-o", "codes", "-m", "model", "--shard", shard]
        done = invoke("data", "encode", str(folder), *args)
        assert done.exit_code == 0, done.stderr
    cache = Cache("codes", tiny_mimi.num_codebooks)
    assert len(cache.takes) == 11
    windows = [cache.read(t) for t in cache.takes if t.kind == "window"]
    assert [w.shape[1] for w in windows] == [30] * 3
    assert not torch.equal(windows[0], windows[-1])


def test_long_silences_follow_clips(folder: Path, tiny_text: Text) -> None:
    """Two words with a second between them, where they would follow at once."""
    flow = Flow(odds={"voices": 0.0}, inside=0, lead_s=(0, 0), tight=1, rest=1, rest_s=(1.0, 1.0))
    words = Utterances([Source(str(folder))], tiny_text, flow, PLAIN).window(75, draws()).words
    starts = [start for _, start, _ in words]
    assert np.diff(starts) == pytest.approx(1.6 + 1.0, abs=1e-6)


def test_envelope_and_pitch_are_read_out_of_the_latent(folder: Path) -> None:
    """Before the codebooks and, since they are aimed at what is read, through them."""
    stage = CodecStage(
        name="codec", mix=(Source(str(folder)),), shapes=(Shape(0.64, 4),), steps=80, lr=1e-2,
        warmup_steps=1, quantize_from=0.75, quantize=1.0, dropout=0.0, critics_from=1.0,
        gain_db=(0.0, 0.0), freeze=("mimi.quantizer.*_proj*",), fit_frames=24,
        losses={"envelope": 1.0, "pitch": 0.5, "commitment": 0.2},
    )  # fmt: skip
    torch.manual_seed(0)
    mimi = Mimi(TINY_MIMI)
    mimi.init_weights(torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in mimi.named_parameters()}
    run = Run(stage, CodecObjective(stage, mimi, Windows([Source(str(folder))])))
    rows = [run.advance() for _ in range(80)]
    seen = [row["envelope"] for row in rows]
    assert sum(seen[55:60]) < 0.5 * sum(seen[:5])
    assert mimi.quantizer.fitted and sum(seen[60:65]) < 1.5 * sum(seen[55:60])
    moved = {name.split(".")[0] for name, p in mimi.named_parameters() if (p != before[name]).any()}
    assert "encoder" in moved and "quantizer" in moved and "decoder" not in moved  # nobody listens


def test_codebooks_are_aimed_at_what_is_read() -> None:
    """Latents [N, 6]: directions 0 and 1 are read (0 weighs more), 3 is taught; what the acoustic
    branch's two numbers lose is what reading costs, and the semantic one gives the third."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 6, generator=g) * torch.tensor([1.0, 1.0, 9.0, 1.0, 9.0, 1.0])
    latents[:, 5] = latents[:, 0]  # known from what is read, though nobody reads it
    quantizer = SplitVq(6, QuantizerConfig(dim=2, codebooks=2, size=4))
    rows = torch.zeros(3, 6)
    rows[0, 0], rows[1, 1] = 3.0, 1.0
    taught = torch.zeros(1, 6)
    taught[0, 3] = 1.0
    aim(quantizer, latents, taught, rows)
    x = latents.T[None]  # [1, 6, N]
    seen = quantizer.acoustic.input_proj(x)[0].T
    assert torch.allclose(seen.square().sum(1), (latents @ rows.T).square().sum(1), rtol=1e-3)
    told = quantizer.acoustic.output_proj(seen.T[None])[0].T
    assert torch.allclose(told[:, [0, 1, 5]], latents[:, [0, 1, 5]], atol=0.05)
    assert told[:, [2, 3, 4]].square().mean() < 0.05
    more = quantizer.semantic.output_proj(quantizer.semantic.input_proj(x))[0].T
    assert torch.allclose((told + more)[:, 3], latents[:, 3], atol=0.05)
    assert more[:, [0, 1, 5]].square().mean() < 1e-2  # of what is given already, nothing


def test_a_tone_has_its_period_in_the_correlation() -> None:
    readout = Readout(16, 24_000, 1920)
    t = torch.arange(4 * 1920) / 24_000
    wav = (0.3 * torch.sin(2 * torch.pi * 150 * t))[None, None]
    r = readout.correlation(wav)
    assert r.shape == (1, 4, 4, 82)
    assert int(r[0, 2, 1].argmax()) + readout.first == 40  # 6000 / 150
    assert r[0, 2, 1].max() == pytest.approx(1, abs=0.02)
    mel = readout.envelope(wav).reshape(4, 8, 40)
    filters = mel_filters(321, 40, 24_000)
    assert mel[2, 3].argmax() == filters[round(150 / 37.5)].argmax()
    silent = readout.envelope(torch.zeros(1, 1, 1920))
    assert torch.allclose(silent, torch.full_like(silent, -2.9957), atol=1e-3)  # ln of 1/20
