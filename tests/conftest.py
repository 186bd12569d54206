"""Shared by all tests: one thread, one seed per test, tiny models that fit together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from moshi_cli.core.config import (
    DepthConfig,
    LmConfig,
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
    TransformerConfig,
)
from moshi_cli.core.lm import MoshiLm
from moshi_cli.core.mimi import Mimi
from moshi_cli.core.text import Text, train_tokenizer

TINY_MIMI = MimiConfig(  # frames of 1920 samples like the real one; 4 codebooks of 16 entries
    seanet=SeanetConfig(dim=16, filters=2),
    transformer=TransformerConfig(
        dim=16, heads=2, layers=2, ff=32, context=8, norm="layer", gated=False, layer_scale=0.01
    ),
    quantizer=QuantizerConfig(dim=8, codebooks=4, size=16),
)
TINY_LM = LmConfig(  # text, a voice and a partner of TINY_MIMI: able to do asr, tts and chat
    temporal=TransformerConfig(dim=16, heads=2, layers=2, ff=48, context=12),
    depth=DepthConfig(dim=16, heads=2, layers=2, ff=48, schedule=(0, 1, 1, 2), inputs=(0, 1, 1, 2)),
    n_q=8,
    dep_q=4,
    delays=(0, 0, 1, 1, 1, 0, 1, 1, 1),
    text_vocab=288,
    text_classes=288,
    codebook_size=16,
)


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the models here are tiny; threads would only cost
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches the network


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws the same numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return Path(__file__).parent.parent


@pytest.fixture
def tiny_mimi(seed: None) -> Mimi:
    """A codec with random weights; its codebooks saw noise, so most codes are in use."""
    mimi = Mimi(TINY_MIMI).eval().requires_grad_(False)
    noise = torch.rand(4, 1, 32 * mimi.frame_samples) * 2 - 1
    latents = mimi.encode_latent(noise).transpose(1, 2).flatten(0, 1)  # [N, D]
    mimi.quantizer.fit(latents, generator=torch.Generator().manual_seed(0))
    return mimi


@pytest.fixture
def tiny_lm(seed: None) -> MoshiLm:
    """An RQ-Transformer with random weights that reads the codes of `tiny_mimi`."""
    return MoshiLm(TINY_LM).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_text() -> Text:
    """A tokenizer of 288 pieces, bytes included, for `tiny_lm`."""
    words = "one two three four say hello to the sky alfa bravo charlie".split()
    sentences = [" ".join(words[i:] + words[:i]) for i in range(len(words))] * 9
    return train_tokenizer(sentences, TINY_LM.text_vocab)
