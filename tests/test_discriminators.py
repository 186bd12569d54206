"""Critics: shapes, splitting, gradients to the sound, and that they can tell two sounds apart."""

from __future__ import annotations

import torch

from moshi_cli.core.discriminators import Discriminator, DiscriminatorConfig
from moshi_cli.core.losses import adversarial_loss, discriminator_loss, feature_loss

SMALL = DiscriminatorConfig(windows=(128, 64), filters=4, strides=(2, 2), dilations=(1, 2))


def test_logits_and_features_of_every_scale() -> None:
    judged = Discriminator(SMALL)(torch.randn(3, 1, 1024))
    assert len(judged.logits) == len(judged.features) == 2
    for logits, features in zip(judged.logits, judged.features, strict=True):
        assert logits.shape[:2] == (3, 1)
        assert [f.shape[:2] for f in features] == [(3, 4)] * 2
        assert logits.shape[2:] == features[-1].shape[2:]
    first, second = judged.split(1)
    assert first.logits[0].shape[0] == 1
    assert torch.equal(second.features[1][1], judged.features[1][1][1:])


def test_rows_of_a_batch_are_judged_alone() -> None:
    critics, wav = Discriminator(SMALL), torch.randn(2, 1, 800)
    both, one = critics(wav), critics(wav[1:])
    for a, b in zip(both.logits, one.logits, strict=True):
        torch.testing.assert_close(a[1:], b)


def test_the_sound_gets_a_gradient_from_both_losses() -> None:
    critics = Discriminator(SMALL)
    wav = torch.randn(1, 1, 512).requires_grad_()
    real, fake = critics(torch.randn(1, 1, 512)), critics(wav)
    for loss in (adversarial_loss(fake), feature_loss(real, fake)):
        (grad,) = torch.autograd.grad(loss, wav, retain_graph=True)
        assert grad.abs().sum() > 0


def test_critics_learn_to_tell_noise_from_tones() -> None:
    critics = Discriminator(SMALL)
    step = torch.optim.Adam(critics.parameters(), 2e-2)
    time = torch.arange(1024) / 24_000
    tones = (torch.rand(8, 1, 1) * 900 + 100) * time * 6.28
    seen = []
    for _ in range(40):
        judged = critics(torch.cat([tones.sin() * 0.3, torch.randn(8, 1, 1024) * 0.2]))
        loss = discriminator_loss(*judged.split(8))
        step.zero_grad()
        loss.backward()
        step.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]
