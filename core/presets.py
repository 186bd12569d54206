"""The published models, and the shape of the built-in one, as configs by name."""

from __future__ import annotations

from dataclasses import replace

from moshi_cli.core.config import (
    MIMI_NANO,
    ConditionConfig,
    DepthConfig,
    FuserConfig,
    LmConfig,
    ModelConfig,
    Sampling,
    TransformerConfig,
)

NEW_MIMI = "mimi-pytorch-e351c8d8@125.safetensors"  # the same codec under its newer name


def temporal(dim: int, heads: int, layers: int, context: int, period: float) -> TransformerConfig:
    """A temporal transformer as in all releases: gated width from 4.125 · dim."""
    return TransformerConfig(dim, heads, layers, int(4.125 * dim), context, period)


def delays(acoustic: int, *voices: int) -> tuple[int, ...]:
    """Text and semantic codes at once, acoustic codes later; one number of codebooks per voice."""
    return (0, *(d for q in voices for d in (0, *[acoustic] * (q - 1))))


def depth(layers: int, ff: int, sets: tuple[int, ...], low_rank: int | None = None) -> DepthConfig:
    """A depth transformer as in all releases: width 1024, 16 heads."""
    return DepthConfig(1024, 16, layers, ff, sets, sets, low_rank)


EIGHT = tuple(range(8))
QUALITIES = ("very_bad", "bad", "neutral", "good", "very_good")
QUALITY = ConditionConfig("description", "lut", 16, 31, QUALITIES)
CFG = ConditionConfig("cfg", "lut", 16, 7, ("1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0"))
CONTROL = ConditionConfig("control", "lut", 2048, 1, ("ok",))
SPEAKERS = ConditionConfig("speaker_wavs", "tensor", 512)

MOSHI_7B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(4096, 32, 32, 3000, 10_000),
        depth=depth(6, 4224, EIGHT),
        n_q=16, dep_q=8, delays=delays(1, 8, 8), text_vocab=32_000, text_classes=32_000,
    ),
    lags={"chat": 0.0},
)  # fmt: skip
HIBIKI_2B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(2560, 20, 24, 1500, 100_000),
        depth=depth(4, 3072, (*EIGHT, *[8] * 8), 128),
        n_q=32, dep_q=16, delays=delays(2, 16, 16), text_vocab=48_000, text_classes=48_000,
        conditions=(QUALITY,), fuser=FuserConfig(sum=("description",)),
    ),
    kind="hibiki", lags={"chat": 0.0}, sampling=Sampling(0.8, 250, 0.8, 50),
    voice_id="ccef4858@200",
    lm_file="hibiki-pytorch-ccef4858@200.safetensors",
    mimi_file=NEW_MIMI, text_file="tokenizer_spm_48k_multi6_2.model",
)  # fmt: skip
HIBIKI_1B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(2048, 16, 16, 1500, 100_000),
        depth=depth(6, 4224, EIGHT),
        n_q=16, dep_q=8, delays=delays(2, 8, 8), text_vocab=48_000, text_classes=48_000,
        conditions=(QUALITY,), fuser=FuserConfig(sum=("description",)),
    ),
    kind="hibiki", lags={"chat": 0.0}, sampling=Sampling(0.8, 250, 0.4, 25),
    mimi_file=NEW_MIMI, text_file="tokenizer_spm_48k_multi6_2.model",
)  # fmt: skip
STT_1B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(2048, 16, 16, 750, 100_000), depth=None,
        n_q=32, dep_q=0, delays=(0,) * 33, text_vocab=8000, text_classes=8000, hears_lag=True,
    ),
    kind="stt", lags={"asr": 0.5}, sampling=Sampling(0.0, 250, 0.0, 50),
    mimi_file=NEW_MIMI, text_file="tokenizer_en_fr_audio_8000.model",
)  # fmt: skip
STT_2_6B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(2048, 32, 48, 375, 100_000), depth=None,
        n_q=32, dep_q=0, delays=(0,) * 33, text_vocab=4000, text_classes=4000, hears_lag=True,
    ),
    kind="stt", lags={"asr": 2.5}, sampling=Sampling(0.0, 250, 0.0, 50), silence_s=1.0,
    mimi_file=NEW_MIMI, text_file="tokenizer_en_audio_4000.model",
)  # fmt: skip
TTS_1_6B = ModelConfig(
    lm=LmConfig(
        temporal=replace(temporal(2048, 16, 16, 500, 10_000), cross_attention=True),
        depth=depth(4, 3072, (*EIGHT, *[8] * 8, *[9] * 8, *[10] * 8), 128),
        n_q=32, dep_q=32, delays=delays(2, 32), text_vocab=8000, text_classes=8000, demux=True,
        conditions=(SPEAKERS, CFG, CONTROL),
        fuser=FuserConfig(sum=("control", "cfg"), cross=("speaker_wavs",), cross_positions=True),
    ),
    kind="tts", lags={"tts": -1.28}, sampling=Sampling(0.6, 250, 0.6, 25), ahead=2,
    voice_id="1e68beda@240",
    lm_file="dsm_tts_1e68beda@240.safetensors",
    mimi_file=NEW_MIMI, text_file="tokenizer_spm_8k_en_fr_audio.model",
)  # fmt: skip

TTS_075B = ModelConfig(
    lm=LmConfig(
        temporal=temporal(1024, 16, 24, 500, 10_000),
        depth=depth(4, 3072, (*EIGHT, *[8] * 8), 128),
        n_q=16, dep_q=16, delays=delays(2, 16), text_vocab=8000, text_classes=5, demux=True,
    ),
    kind="tts", lags={"tts": -1.28}, sampling=Sampling(0.6, 250, 0.6, 25), ahead=2,
    voice_id="d6ef30c7@1000",
    lm_file="dsm_tts_d6ef30c7@1000.safetensors",
    mimi_file=NEW_MIMI, text_file="tokenizer_spm_8k_en_fr_audio.model",
)  # fmt: skip

# Words of the `lag` condition, frames: speak, converse, listen with more and more delay.
LAGS = ("-8", "0", "4", "8", "16", "31")
# The built-in model: one set of weights for asr, tts and chat, told the lag; 19 M parameters, as
# many as a few hours of two cores can teach (examples/train_builtin/LOG.md).
MOSHI_NANO = ModelConfig(
    mimi=MIMI_NANO,
    lm=LmConfig(
        temporal=temporal(256, 4, 9, 250, 10_000),
        depth=DepthConfig(
            144, 9, 3, 600, (0, 1, 2, 3, 4, 4, 5, 5), (0, 1, 2, 3, 4, 4, 5, 5), low_rank=64
        ),
        n_q=16, dep_q=8, delays=delays(1, 8, 8), text_vocab=2000, text_classes=2000, low_rank=64,
        conditions=(ConditionConfig("lag", "lut", 16, len(LAGS), LAGS),),
        fuser=FuserConfig(sum=("lag",)),
    ),
    lags={"chat": 0.0, "asr": 0.64, "tts": -0.64},
    silence_s=0.48,  # words at the very beginning are not heard well
    mimi_file="mimi.safetensors", mimi_config_file="mimi.json", text_file="text.model",
)  # fmt: skip

PRESETS = {
    "moshi-7b": MOSHI_7B,
    "hibiki-2b": HIBIKI_2B,
    "hibiki-1b": HIBIKI_1B,
    "stt-1b": STT_1B,
    "stt-2.6b": STT_2_6B,
    "tts-1.6b": TTS_1_6B,
    "tts-0.75b": TTS_075B,
    "moshi-nano": MOSHI_NANO,
}
