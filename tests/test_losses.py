"""Losses: the language model's against a slow obvious one, the codec's on known sounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY_LM
from torch import Tensor

from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.losses import (
    Balancer,
    LmWeights,
    SpectralLoss,
    asked,
    distillation_loss,
    join_shifted,
    learnable,
    lm_loss,
    mel_filters,
)
from moshi_cli.core.streams import ZERO, DelayPattern, Role, Task

TASKS = {
    "asr": Task("asr", Role.SAMPLED, Role.GIVEN, lag_s=0.24),
    "tts": Task("tts", Role.STEERED, Role.SAMPLED, lag_s=-0.16),
    "chat": Task("chat", Role.SAMPLED, Role.SAMPLED, Role.GIVEN),
}
WEIGHTS = LmWeights(text=1.5, pad=0.5, semantic=7.0, acoustic=0.5, audio=2.0)


def grid(task: str, rows: int = 2, frames: int = 6) -> Tensor:
    """Random tokens for a task, with some unknown ones. long[B, K, T]"""
    c = TINY_LM
    codes = torch.randint(c.codebook_size, (rows, c.streams, frames))
    codes[:, 0] = torch.randint(6, (rows, frames))  # PAD and EPAD among them
    codes[0, 0, 2] = ZERO
    codes[1, 2, 3] = ZERO
    if TASKS[task].partner is Role.ABSENT:
        codes[:, 1 + c.voice_q :] = ZERO
    return codes


def slow_loss(lm: MoshiLm, codes: Tensor, task: Task, worth: Tensor | None = None) -> Tensor:
    """The same number, position by position, from the definition of delays."""
    c, pattern = lm.config, DelayPattern.of(task, lm.config)
    B, K, T = codes.shape
    steps = T + pattern.span
    delayed = torch.full((B, K, steps + 1), ZERO)
    target = torch.full((B, K, steps), ZERO)
    for k in range(K):
        absent = pattern.roles[k] is Role.ABSENT
        for s in range(steps + 1):
            frame = s - 1 - pattern.delays[k]
            if s <= pattern.starts[k]:
                delayed[:, k, s] = c.start_tokens[k]
            elif not absent and 0 <= frame < T:
                delayed[:, k, s] = codes[:, k, frame]
        for s in range(steps):
            frame = s - pattern.delays[k]
            if pattern.roles[k] in (Role.SAMPLED, Role.STEERED) and 0 <= frame < T:
                target[:, k, s] = codes[:, k, frame]
    assert lm.depth is not None
    h, text_logits = lm.temporal(delayed[..., :-1])
    audio_logits = lm.depth_logits(h, delayed[:, : 1 + c.dep_q, 1:])
    sums = torch.zeros(4)  # text, its weights, audio, its weights
    for b in range(B):
        for s in range(steps):
            for k in range(1 + c.dep_q):
                wanted = int(target[b, k, s])
                if wanted == ZERO:
                    continue
                logits = text_logits[b, s] if k == 0 else audio_logits[b, k - 1, s]
                ce = logits.logsumexp(0) - logits[wanted]
                if k == 0:
                    weight = WEIGHTS.pad if wanted in (c.text_pad, c.text_epad) else 1.0
                    sums = sums + torch.stack([ce * weight, ce * 0 + weight, ce * 0, ce * 0])
                else:
                    weight = WEIGHTS.semantic if k == 1 else WEIGHTS.acoustic
                    counts = 1 if worth is None else worth[b, s - pattern.delays[k]]
                    sums = sums + torch.stack(
                        [ce * 0, ce * 0, ce * weight * counts, ce * 0 + weight]
                    )
    audio = sums[2] / sums[3] if sums[3] else sums[2]
    return WEIGHTS.text * sums[0] / sums[1] + WEIGHTS.audio * audio


@pytest.mark.parametrize(("name", "weighed"), [*((name, False) for name in TASKS), ("tts", True)])
def test_lm_loss_is_the_obvious_one_and_so_is_its_gradient(
    tiny_lm: MoshiLm, name: str, weighed: bool
) -> None:
    tiny_lm.requires_grad_(True)
    codes, pattern = grid(name), DelayPattern.of(TASKS[name], TINY_LM)
    worth = torch.randn(codes.shape[0], codes.shape[2]) if weighed else None
    fast = lm_loss(tiny_lm, learnable(pattern.shift(codes, worth=worth), pattern), WEIGHTS)
    slow = slow_loss(tiny_lm, codes, TASKS[name], worth)
    torch.testing.assert_close(fast.total, slow)
    params = list(tiny_lm.parameters())
    gradients = [torch.autograd.grad(x, params, allow_unused=True) for x in (fast.total, slow)]
    for (key, _), a, b in zip(tiny_lm.named_parameters(), *gradients, strict=True):
        if a is None or b is None:
            assert a is b is None or float((a if b is None else b).abs().max()) == 0, key  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=key)


def test_only_what_the_task_makes_is_learnt(tiny_lm: MoshiLm) -> None:
    pattern = DelayPattern.of(TASKS["asr"], TINY_LM)
    losses = lm_loss(tiny_lm, learnable(pattern.shift(grid("asr")), pattern))
    assert losses.audio == 0
    assert losses.text > 0


def test_tasks_of_different_length_share_a_batch(tiny_lm: MoshiLm) -> None:
    parts, alone = [], []
    for name in ("asr", "chat"):
        pattern = DelayPattern.of(TASKS[name], TINY_LM)
        parts.append(learnable(pattern.shift(grid(name, frames=5 + len(name))), pattern))
        alone.append(lm_loss(tiny_lm, parts[-1]))
    both = lm_loss(tiny_lm, join_shifted(parts))
    torch.testing.assert_close(both.audio, alone[1].audio)
    assert min(alone[0].text, alone[1].text) <= both.text <= max(alone[0].text, alone[1].text)


def test_weights_of_streams_and_padding(tiny_lm: MoshiLm) -> None:
    pattern = DelayPattern.of(TASKS["chat"], TINY_LM)
    shifted = learnable(pattern.shift(grid("chat")), pattern)
    semantic = lm_loss(tiny_lm, shifted, LmWeights(semantic=1.0, acoustic=0.0))
    torch.testing.assert_close(semantic.audio, semantic.streams[1])
    plain = lm_loss(tiny_lm, shifted, replace(WEIGHTS, pad=1.0))
    torch.testing.assert_close(plain.text, plain.streams[0])
    words = lm_loss(tiny_lm, shifted, replace(WEIGHTS, pad=0.0))
    assert not torch.isclose(words.text, plain.text)


def test_a_scripted_head_says_when_a_word_begins() -> None:
    """Two tokens in one id, five classes: the targets of a published TTS, with finite loss."""
    config = replace(TINY_LM, demux=True, text_classes=5)
    card = config.text_vocab + 1
    fed = torch.tensor([3, 4, 0, 10, 0 * card + 9, (0 + 1) * card + 9, (7 + 1) * card + 3])
    assert asked(fed, config).tolist() == [3, 4, 0, 3, 3, 0, 3]
    assert torch.equal(asked(fed, replace(TINY_LM, text_classes=9999)), fed)
    lm, pattern = MoshiLm(config), DelayPattern.of(TASKS["tts"], config)
    codes = grid("tts")
    codes[:, 0] = fed[1:]
    losses = lm_loss(lm, learnable(pattern.shift(codes), pattern), WEIGHTS)
    assert losses.total.isfinite() and losses.text > 0
    losses.total.backward()
    assert lm.text_emb.right is not None and lm.text_emb.right.weight.grad is not None


def test_mel_filters_cover_the_band_once() -> None:
    filters = mel_filters(1025, 80, 24_000)
    assert filters.shape == (1025, 80)
    assert filters.min() >= 0
    inner = filters[30:900].sum(1)  # neighbouring triangles add up to one
    torch.testing.assert_close(inner, torch.ones_like(inner))


@pytest.mark.parametrize("mel", [True, False])
def test_spectral_loss_orders_sounds(mel: bool) -> None:
    loss = SpectralLoss(24_000, (64, 512), mel=mel)
    wav = torch.randn(2, 1, 4800) * 0.1
    near, far = wav + torch.randn_like(wav) * 0.01, torch.randn_like(wav) * 0.3
    assert loss(wav, wav) < 1e-3
    assert loss(wav, wav) < loss(near, wav) < loss(far, wav)
    made = near.clone().requires_grad_()
    loss(made, wav).backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


def test_spectral_loss_of_silence_is_finite() -> None:
    made = torch.zeros(1, 1, 2400, requires_grad=True)
    SpectralLoss(24_000, (64, 512))(made, torch.randn(1, 1, 2400)).backward()
    assert made.grad is not None
    assert made.grad.isfinite().all()


def test_distillation_skips_frames_without_a_teacher() -> None:
    teacher = torch.randn(1, 4, 8)
    student = teacher * 3
    student[0, 2] = -student[0, 2]
    teacher[0, 2] = 0
    assert distillation_loss(student, teacher).abs() < 1e-6
    assert distillation_loss(student, torch.zeros_like(teacher)) == 0
    assert math.isclose(float(distillation_loss(-teacher, teacher)), 2.0, rel_tol=1e-5)


def test_balancer_gives_every_loss_its_share() -> None:
    at = torch.randn(3, 1, 50, requires_grad=True)
    losses = {"unit": (at**2).sum() * 0.1, "loud": at.sum() * 1e6, "off": at.abs().sum()}
    balancer = Balancer({"unit": 2.0, "loud": 1.0, "off": 0.0})
    mixed = balancer.gradient(losses, at)
    unit = at.detach() * 0.2
    rest = (mixed - unit).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(rest, unit.flatten(1).norm(dim=1).mean() / 2, rtol=1e-4, atol=0)
    assert set(balancer.norms) == {"unit", "loud"}
    broken = {"unit": at.sum() * math.nan}
    assert balancer.gradient(broken, at).isnan().all()
