"""Configuration as plain data: frozen dataclasses, every field with its unit, unknown keys refused.

`from_kyutai` reads the JSON layout of the published checkpoints, `to_kyutai` writes it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from moshi_cli.core.errors import ModelError, UsageError

if TYPE_CHECKING:
    from moshi_cli.core.streams import Task


def refuse_unknown(keys: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ModelError naming the first unknown key and the nearest known one."""
    known = sorted(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ModelError(f"{where}: unknown key {key!r}", hint=hint)


def need(data: Mapping[str, Any], key: str, where: str) -> Any:
    """data[key], or a ModelError that names what is missing."""
    if key not in data:
        raise ModelError(f"{where}: missing key {key!r}")
    return data[key]


@dataclass(frozen=True)
class TransformerConfig:
    """One causal stack: Mimi's two, or the temporal transformer."""

    dim: int  # width D
    heads: int
    layers: int
    ff: int  # nominal feed-forward width (gated stacks use about 2/3 of it)
    context: int | None  # keys each step may see, itself included; None: all
    max_period: float = 10_000.0  # RoPE
    norm: str = "rms"  # "rms" or "layer"
    gated: bool = True  # SiLU gate, else GELU
    rope: str = "interleaved"  # "interleaved", "half" or "none"
    layer_scale: float | None = None  # initial value
    kv_repeat: int = 1  # query heads per key head
    cross_attention: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.heads % self.kv_repeat:
            raise ModelError(f"heads {self.heads} do not divide width {self.dim} / kv_repeat")
        if self.rope != "none" and (self.dim // self.heads) % 2:
            raise ModelError(f"head width {self.dim // self.heads} must be even for RoPE")


@dataclass(frozen=True)
class SeanetConfig:
    """Mimi's convolutional encoder and decoder (paper §3.3.1)."""

    dim: int = 512  # latent channels
    filters: int = 64  # channels at 24 kHz; doubled at every stage
    ratios: tuple[int, ...] = (8, 6, 5, 4)  # decoder order: up-sampling per stage
    kernel: int = 7
    last_kernel: int = 3
    residual_kernel: int = 3
    residual_layers: int = 1  # residual blocks per stage
    dilation_base: int = 2
    compress: int = 2  # channel reduction inside a residual block

    @property
    def hop(self) -> int:
        """Samples per latent."""
        return prod(self.ratios)


@dataclass(frozen=True)
class QuantizerConfig:
    """Split residual vector quantiser (paper §3.3.2): 1 semantic + (codebooks - 1) acoustic."""

    dim: int = 256  # width inside each branch
    codebooks: int = 32  # Q in the file
    size: int = 2048  # C, entries per codebook
    semantic: int = 1
    beam: int = 1  # paths that `encode` keeps from codebook to codebook; 1: the nearest entry. With
    # more, fewer codebooks are not the first of more


@dataclass(frozen=True)
class MimiConfig:
    """The codec. Defaults are the published Mimi (96,151,393 parameters)."""

    seanet: SeanetConfig = SeanetConfig()
    transformer: TransformerConfig = TransformerConfig(
        dim=512, heads=8, layers=8, ff=2048, context=250, norm="layer", gated=False,
        layer_scale=0.01,
    )  # fmt: skip
    quantizer: QuantizerConfig = QuantizerConfig()
    sample_rate: int = 24_000  # Hz
    frame_rate: float = 12.5  # Hz

    def __post_init__(self) -> None:
        if (
            self.sample_rate % self.seanet.hop
            or self.stride * self.seanet.hop != self.frame_samples
        ):
            raise ModelError(
                f"ratios {self.seanet.ratios} do not divide a frame of {self.frame_samples} samples"
            )
        if self.transformer.dim != self.seanet.dim:
            raise ModelError("the codec transformers must be as wide as the SEANet latent")

    @property
    def frame_samples(self) -> int:
        """Samples per frame: 1920 at 24 kHz and 12.5 Hz."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def stride(self) -> int:
        """Latents per frame: 2 for Mimi (25 Hz -> 12.5 Hz)."""
        return round(self.sample_rate / self.seanet.hop / self.frame_rate)

    @classmethod
    def from_kyutai(cls, data: Mapping[str, Any], where: str = "mimi config") -> MimiConfig:
        """Read the published JSON layout; ModelError on unknown keys and unsupported values."""
        from moshi_cli.core.kyutai_mimi import read_mimi

        return read_mimi(data, where)

    def to_kyutai(self) -> dict[str, Any]:
        """The published JSON layout."""
        from moshi_cli.core.kyutai_mimi import write_mimi

        return write_mimi(self)


@dataclass(frozen=True)
class ConditionConfig:
    """One conditioner: something the model is told beside the streams."""

    name: str
    kind: str  # "lut" (one word out of a list) or "tensor" (a sequence of vectors)
    dim: int  # width before the projection
    bins: int = 0  # lut: rows of the table, less the one for "nothing"
    values: tuple[str, ...] = ()  # lut: the words; empty: any text, hashed into a row


@dataclass(frozen=True)
class FuserConfig:
    """Where conditions enter the temporal transformer."""

    sum: tuple[str, ...] = ()  # added to every input vector
    cross: tuple[str, ...] = ()  # attended to by every layer
    cross_positions: bool = False  # add sinusoidal positions to what is attended to
    cross_scale: float = 1.0


@dataclass(frozen=True)
class DepthConfig:
    """The depth transformer: the codebooks of one frame, one after the other (paper §3.4.2)."""

    dim: int  # width d
    heads: int
    layers: int
    ff: int  # nominal feed-forward width
    schedule: tuple[int, ...]  # weight set of codebook k, in attention and feed-forward
    inputs: tuple[int, ...]  # weight set of codebook k, in the projection from the temporal width
    low_rank: int | None = None  # width of factorised embeddings
    kv_repeat: int = 1  # query heads per key head
    norm: str = "rms"
    gated: bool = True
    norm_out: str | None = None  # a norm before each head: "rms", "layer" or none
    numbered: bool = True  # files number the weight sets, even if there is one only

    def __post_init__(self) -> None:
        if self.dim % self.heads or self.heads % self.kv_repeat:
            raise ModelError(f"depth heads {self.heads} do not divide width {self.dim}")
        for name in ("schedule", "inputs"):
            sets = getattr(self, name)
            if not sets or set(sets) != set(range(max(sets) + 1)):
                raise ModelError(f"depth {name} {sets} must use every set from 0 on")
        if len(self.schedule) != len(self.inputs):
            raise ModelError("depth schedule and inputs must have one entry per codebook")


@dataclass(frozen=True)
class LmConfig:
    """The RQ-Transformer over K = 1 + n_q streams: text, the voice, the partner."""

    temporal: TransformerConfig
    depth: DepthConfig | None  # None: writes only (STT)
    n_q: int  # audio streams read
    dep_q: int  # of these, how many the model makes
    delays: tuple[int, ...]  # frames per stream, text first (paper §3.4.4)
    text_vocab: int  # V; the start token is V itself
    text_classes: int  # classes of the text head, normally V
    codebook_size: int = 2048  # C; the start token is C itself
    text_pad: int = 3  # PAD
    text_epad: int = 0  # EPAD: the frame before a word
    low_rank: int | None = None  # width of factorised audio embeddings (not in published models)
    residual: int = 0  # what codes leave of a given voice, per branch: numbers heard beside them
    demux: bool = False  # two text tokens in one id: left + (right + 1) * (V + 1)
    extra_heads: int = 0
    extra_classes: int = 6
    conditions: tuple[ConditionConfig, ...] = ()
    fuser: FuserConfig | None = None
    hears_lag: bool = False  # text sampled before the lag is over is fed back (published STT)

    def __post_init__(self) -> None:
        if len(self.delays) != 1 + self.n_q:
            raise ModelError(f"{len(self.delays)} delays for {1 + self.n_q} streams")
        if min(self.delays) < 0:
            raise ModelError("delays must not be negative")
        if not 0 <= self.dep_q <= self.n_q or (self.depth is None) != (self.dep_q == 0):
            raise ModelError(f"cannot make {self.dep_q} of {self.n_q} codebooks")
        if self.depth is not None and len(self.depth.schedule) != self.dep_q:
            raise ModelError(f"depth schedule {self.depth.schedule} is not for {self.dep_q} steps")
        known = {c.name for c in self.conditions}
        for name in (*self.fuser.sum, *self.fuser.cross) if self.fuser else ():
            if name not in known:
                raise ModelError(f"the fuser uses {name!r}, which no conditioner makes")

    @property
    def streams(self) -> int:
        """K."""
        return 1 + self.n_q

    @property
    def voice_q(self) -> int:
        """Codebooks of the voice that the text writes down."""
        return self.dep_q or self.n_q

    @property
    def partner_q(self) -> int:
        """Codebooks of the other side."""
        return self.n_q - self.voice_q

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """The token each stream begins with."""
        return (self.text_vocab, *[self.codebook_size] * self.n_q)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temp 0 is greedy; top_k 0 keeps all; top_p 1 keeps all."""

    temp: float = 0.8  # codes
    top_k: int = 250
    text_temp: float = 0.7
    text_top_k: int = 25
    top_p: float = 1.0  # both
    guidance: float = 1.0  # classifier-free guidance; 1: none
    guide_text: bool = True  # False: text from the conditional half, the null half reads no text
    pad_bonus: float = 0.0  # added to the logit of PAD before sampling text
    beam: int = 1  # hypotheses of the text, of tasks that write only; 1: greedy or sampled
    lm_weight: float = 0.0  # of the model's n-grams among them …
    token_bonus: float = 0.0  # … and what a token of text gains beside: n-grams like few words
    shifts: int = 1  # times that a search hears the sound, each a part of a frame later
    takes: int = 1  # of a sentence that is spoken, of which the one is kept that is heard best

    def __post_init__(self) -> None:
        if min(self.temp, self.text_temp) < 0 or not math.isfinite(self.temp + self.text_temp):
            raise UsageError("a temperature must be zero or positive")
        if min(self.top_k, self.text_top_k) < 0:
            raise UsageError("top-k must be zero (keep all) or positive")
        if self.beam < 1:
            raise UsageError("a search keeps at least one hypothesis")
        if self.shifts < 1 or (self.shifts > 1 and self.beam == 1):
            raise UsageError("sound is heard once, or more often by a search of two hypotheses")
        if self.takes < 1:
            raise UsageError("a sentence has one take, or more")
        if not 0 < self.top_p <= 1:
            raise UsageError("top-p must be above 0 and at most 1")

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional half of the batch is needed."""
        return self.guidance != 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A checkpoint: codec, language model, what they can do, and the names of the files."""

    mimi: MimiConfig = MimiConfig()
    lm: LmConfig | None = None  # None: a codec alone
    kind: str = "moshi"  # "moshi", "hibiki", "stt" or "tts", as upstream calls them
    lags: Mapping[str, float] = field(
        default_factory=dict
    )  # task name -> lag_s it was trained with
    sampling: Sampling = Sampling()
    samplings: Mapping[str, Sampling] = field(
        default_factory=dict
    )  # task name -> how that task draws instead; with guidance if it learnt to do without text
    silence_s: float = 0.0  # silence an STT wants before the sound
    ahead: int = 0  # words of look-ahead in the second text stream of a TTS
    voice_id: str = ""  # suffix of voice files made for this TTS, "sig@epoch"
    lm_file: str = "model.safetensors"
    mimi_file: str = "tokenizer-e351c8d8-checkpoint125.safetensors"
    mimi_config_file: str | None = None
    text_file: str = "tokenizer_spm_32k_3.model"
    ngram_file: str | None = None  # what is usually said (ngram.py)
    lora_file: str | None = None
    lora_rank: int = 128
    lora_scaling: float = 2.0

    @property
    def codebooks(self) -> int:
        """Codebooks per voice."""
        if self.lm is None:
            return self.mimi.quantizer.codebooks
        return max(self.lm.dep_q, self.lm.n_q - self.lm.dep_q)

    def sampling_of(self, task: str) -> Sampling:
        """How a task of that name draws its tokens."""
        return self.samplings.get(task, self.sampling)

    def fit(self, task: Task) -> Task:
        """The task with the lag this checkpoint was trained with; ModelError if it cannot do it."""
        if task.name not in self.lags:
            can = ", ".join(self.lags) or "codec only"
            raise ModelError(f"this model cannot do {task.name!r}", hint=f"it can do: {can}")
        return replace(task, lag_s=self.lags[task.name])

    @classmethod
    def from_kyutai(
        cls, data: Mapping[str, Any], mimi: MimiConfig | None = None, where: str = "config.json"
    ) -> ModelConfig:
        """Read the published config.json; ModelError on unknown keys and unsupported values."""
        from moshi_cli.core.kyutai_lm import read_model

        return read_model(data, mimi or MimiConfig(), where)

    def to_kyutai(self) -> dict[str, Any]:
        """The published JSON layout."""
        from moshi_cli.core.kyutai_lm import write_model

        return write_model(self)


# The codec of the built-in model: Mimi's classes, small enough to train on a laptop.
MIMI_NANO = MimiConfig(
    seanet=SeanetConfig(dim=192, filters=16, ratios=(6, 5, 4, 8)),
    transformer=TransformerConfig(
        dim=192, heads=3, layers=4, ff=768, context=250, norm="layer", gated=False,
        layer_scale=0.01,
    ),
    quantizer=QuantizerConfig(dim=64, codebooks=8, beam=8),
)  # fmt: skip
