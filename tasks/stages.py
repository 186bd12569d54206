"""Stages of training as plain data: what to hear, what may learn, which losses, how long.

`STAGES` holds the stages of the paper (§4.3, with its rates) as values; a configuration file starts
from one of them (see recipes.py). What kind of objective a stage has follows from its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moshi_cli.core.config import Sampling
from moshi_cli.tasks.augment import Augment


@dataclass(frozen=True)
class Source:
    """One pack of recordings and its share of the mix."""

    folder: str  # or file
    form: str = "takes"  # what lies there: a name of mixture.FORMS (language models only)
    family: str = ""  # a batch is of one family; each family has optimiser states of its own
    weight: float = 1.0  # relative share of the windows drawn
    kinds: tuple[str, ...] = ()  # prefixes of the row kinds to use; empty: all
    skip: tuple[str, ...] = ("noisy",)  # prefixes of the row kinds to leave out
    own: str = "first"  # whose line of a recording is the own voice: first, second or either

    def wants(self, kind: str) -> bool:
        """Whether rows of this kind are used."""
        wanted = not self.kinds or kind.startswith(self.kinds)
        return wanted and not (self.skip and kind.startswith(self.skip))


@dataclass(frozen=True)
class Flow:
    """How clips follow each other in windows that are put together from them (utterances.py)."""

    odds: dict[str, float] = field(default_factory=dict)  # kind (prefix) -> weight of a clip
    inside: float = 0.3  # how often a window starts within a clip
    lead_s: tuple[float, float] = (0.0, 0.6)  # … and else the silence before the first one
    tight: float = 0.3  # how often a clip follows without a pause
    gap_s: tuple[float, float] = (0.05, 0.8)  # … and else the pause
    excerpt: float = 0.0  # how often only some words of a clip, in a row, are spoken
    rest: float = 0.0  # how often a long silence follows a clip …
    rest_s: tuple[float, float] = (1.0, 5.0)  # … and how long
    own: tuple[str, ...] = ("moshi",)  # kinds that keep their pace


@dataclass(frozen=True)
class Casting:
    """Which kinds of takes (by prefix) play which part, and the timing of a conversation
    (samples.py)."""

    own: tuple[str, ...] = ("moshi",)  # the model's own voice
    heard: tuple[str, ...] = ()  # what asr listens to; empty: every take with words
    asks: str = "question"
    answers: str = "moshi-answer"
    gap_s: tuple[float, float] = (0.25, 0.7)  # from the end of the question to the answer
    rest_s: tuple[float, float] = (0.3, 2.5)  # from the end of the answer to the next question
    chatter: float = 0.1  # probability that the partner says something that is no question
    others: float = 0.0  # probability that tts is another voice, `heard` ones too: there is more
    hiss: float = 0.5  # probability that a silent partner's line is not quite silent
    wait: float = 0.15  # probability of a long silence before a question …
    wait_s: tuple[float, float] = (2.0, 8.0)  # … and how long
    interrupt: float = 0.0  # probability that the partner speaks into an answer …
    stop_s: tuple[float, float] = (0.24, 0.56)  # … and how long the model then speaks on
    odds: dict[str, float] = field(default_factory=dict)  # kind (prefix) -> weight of a take


def weight_of(kind: str, odds: Mapping[str, float]) -> float:
    """The weight of the first prefix that fits, or 1."""
    return next((weight for prefix, weight in odds.items() if kind.startswith(prefix)), 1.0)


@dataclass(frozen=True)
class Shape:
    """One form a batch may take; a stage draws one per step."""

    window_s: float
    batch: int
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage has. Rates are per step; the schedule runs over the stage's budget."""

    name: str
    mix: tuple[Source, ...]
    losses: dict[str, float]  # loss name -> weight
    accumulate: int = 1  # batches whose gradients make one step
    shapes: tuple[Shape, ...] = (Shape(1.28, 4),)
    learn: tuple[str, ...] = ("*",)  # shell patterns over "module.parameter" names that learn …
    freeze: tuple[str, ...] = ()  # … but for these
    lr: float = 3e-4
    rates: dict[str, float] = field(default_factory=dict)  # pattern -> factor on lr, first match
    family_rates: dict[str, dict[str, float]] = field(default_factory=dict)  # more factors on lr
    betas: tuple[float, float] = (0.8, 0.99)
    muon: float = 0.0  # rate of Muon, which then takes the matrices; 0: AdamW for all
    muon_rounds: int = 5
    muon_not: tuple[str, ...] = (
        "*emb*", "*heads*", "*text_linear*", "*conditioning*",
        "projection.*", "speller.*", "critics.*",
    )  # fmt: skip
    weight_decay: float = 0.0  # on matrices only
    lexicon: str | None = None  # file of how words sound, for the loss `letters` (spelling.py)
    warmup_steps: int = 200
    final_lr: float = 0.02  # part of lr left at the end of the cosine
    clip: float = 1.0  # gradient norm per module; 0: off
    steps: int = 100_000
    minutes: float | None = None  # budget of wall time; the schedule follows the tighter one
    ema: float = 0.0  # decay of the weight average; 0: none kept
    bf16: bool = False  # autocast; weights stay float32
    recompute: bool = False  # activations of a layer are computed again instead of kept
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class CodecStage(Stage):
    """Mimi (paper §3.3). Parts of the budget: without quantiser until `quantize_from`, then
    reconstruction, and with critics from `critics_from` on.

    Losses: mel, stft, wave (relative L1), adversarial (its weight against mel's gradient), feature
    (against adversarial), listener (a recogniser's ear for the decoded sound), distillation,
    commitment, recognition (of words, through the semantic codebook) and pad (a frame without a
    word within it), envelope and pitch (read out of the latent, see readout.py), letters (the same,
    see spelling.py). Without a loss of the decoded sound nothing is decoded, and the decoder rests.
    """

    losses: dict[str, float] = field(
        default_factory=lambda: {
            "mel": 1.0, "wave": 0.02, "adversarial": 0.7, "feature": 4.0,
            "distillation": 1.0, "commitment": 1.0,
        }
    )  # fmt: skip
    muon_rounds: int = 3
    warmup_steps: int = 100
    clip: float = 20.0
    floor: float = 1e-2  # of the spectra; lower ones make silence outweigh speech
    quantize_from: float = 0.15  # the codebooks get their first values by k-means there
    quantize: float = 0.5  # probability, per item, that the latent is quantised …
    fit_frames: int = 8  # per entry: what codebooks are fitted to at `quantize_from`
    quantize_late: float = 1.0  # … and once the critics count
    codebook_decay: float = 0.99
    dropout: float = 0.25  # probability, per item, of fewer codebooks
    critics_from: float = 0.5  # 1: never
    critics_ramp: float = 0.02  # in which the critics only learn
    critics_window_s: float = 0.64  # random crop that the critics see
    gain_db: tuple[float, float] = (-12.0, 6.0)
    crop_s: float | None = None  # length of what is decoded of each window; None: all of it
    hears_after: int = 8  # frames between a word's start and its recognition
    tries: int = 2  # candidates per window, of which the one with most sound is taken
    flow: Flow | None = None  # windows put together of clips with their words; None: cut from packs
    augment: Augment = field(default_factory=Augment)  # what happens to those
    listener: str | None = None  # folder of a Whisper, for the loss of this name


@dataclass(frozen=True)
class Lora:
    """Adapters on every linear layer learn in its place (see core/lora.py)."""

    rank: int = 64
    scaling: float = 2.0
    embeddings: bool = False  # the embedding tables learn too


@dataclass(frozen=True, kw_only=True)
class LmStage(Stage):
    """The language model on cached codes: per-stream weights, one lag per task (paper §3.4).

    Losses: text, pad (a PAD or EPAD within it), audio, semantic and acoustic (a code within it),
    letters of what is heard and spoken.
    """

    losses: dict[str, float] = field(
        default_factory=lambda: {
            "text": 1.0, "pad": 0.5, "audio": 1.0, "semantic": 100.0, "acoustic": 1.0,
        }
    )  # fmt: skip
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    tasks: dict[str, float] = field(
        default_factory=lambda: {"asr": 1.0, "tts": 1.0, "chat": 1.0}
    )  # share of each task
    lag_s: dict[str, float] = field(default_factory=dict)  # > 0: text trails the voice; a task that
    # is not named has the lag that the model was trained with (finetune.prepare)
    other_lags_s: dict[str, tuple[float, ...]] = field(default_factory=dict)  # more lags of a task;
    # half of its samples of takes have its own, the others one of these
    hide: float = 0.0  # probability that a code is not seen as input
    narrow: float = 0.0  # … that of a voice, for a whole item, only the first codebooks are seen
    narrow_given: float = 0.0  # … the same, for a voice that the task gives
    deaf: float = 0.0  # … that the voice it makes is not seen at all for an item: text must do
    untold: float = 0.0  # … that it makes a voice without seeing any text: what guidance leaves
    hide_text: float = 0.0  # … that a text token is not seen
    doubt: float = 0.0  # … that a word's is not, or seen as another (half of each), where no voice
    # is made: what is heard must do, not what followed such words in training
    gaps: float = 0.0  # part of a given voice that is not heard at all, in runs of 2 to 6 frames
    dropout: float = 0.0  # part of what each layer adds that is left out, where no voice is made
    spelled_by: int = 3  # lower layers that the loss `letters` teaches (see spelling.py)
    depth_share: float = 1.0  # part of the frames on which the depth transformer learns
    compile: bool = False  # the temporal layers are compiled, for each of `shapes`
    acoustic_delay: int | None = None  # frames; None: as the model has it
    residual: bool = False  # the model learns to hear what codes leave of a given voice, too
    sampling: dict[str, Sampling] = field(default_factory=dict)  # of a task, for the model's users;
    # guidance other than 1 tells that it learnt to be guided by its text (`untold`)
    lag_range_s: tuple[float, float] = (0.0, 0.0)  # single streams: drawn for each sample
    lora: Lora | None = None  # adapters instead of the weights themselves
    casting: Casting = Casting()  # of sources of the form "takes"


SHARES = (  # what cannot be less than 0 or more than 1
    "dropout", "ema", "hide", "narrow", "narrow_given", "deaf", "untold", "hide_text", "doubt",
    "gaps", "depth_share",
)  # fmt: skip
LOSSES: dict[type[Stage], tuple[str, ...]] = {  # what the weights are for
    CodecStage: (
        "mel", "stft", "wave", "adversarial", "feature", "listener", "distillation",
        "commitment", "recognition", "pad", "envelope", "pitch", "letters",
    ),
    LmStage: ("text", "pad", "audio", "semantic", "acoustic", "letters"),
}  # fmt: skip
SPEECH_RATES = {"lm.text_emb*": 0.75, "lm.text_linear*": 0.75}  # … where text is known already
NO_SPEECH = (  # what text does not reach
    "lm.emb*", "lm.residual*", "lm.depth*", "lm.conditioning*", "lm.extra*",
)  # fmt: skip
FAMILY_RATES = {"": SPEECH_RATES, "text": dict.fromkeys(NO_SPEECH, 0.0)}

# The stages of the paper, with its steps and rates; a source's folder is yours to name.
STAGES: dict[str, Stage] = {
    "codec": CodecStage(name="codec", mix=()),
    "text": LmStage(
        name="text", mix=(), tasks={}, freeze=NO_SPEECH, shapes=(Shape(327.68, 8),), lr=3e-4,
        steps=500_000, warmup_steps=2000,
    ),
    "pretrain": LmStage(
        name="pretrain", mix=(), tasks={}, shapes=(Shape(300.0, 1),), lr=3e-5,
        rates={"lm.depth*": 20 / 3}, family_rates=FAMILY_RATES, hide_text=0.3,
        acoustic_delay=2, lag_range_s=(-0.6, 0.6), steps=1_000_000, warmup_steps=2000,
    ),
    "diarised": LmStage(
        name="diarised", mix=(), tasks={}, shapes=(Shape(300.0, 1),), lr=3e-6,
        rates={"lm.depth*": 50 / 3}, family_rates=FAMILY_RATES, acoustic_delay=2,
        steps=100_000, warmup_steps=2000,
    ),
    "duplex": LmStage(
        name="duplex", mix=(), tasks={}, shapes=(Shape(300.0, 1),), lr=2e-6,
        rates={"lm.depth*": 2.0}, acoustic_delay=1, steps=10_000, warmup_steps=500,
    ),
    "instruct": LmStage(
        name="instruct", mix=(), tasks={}, shapes=(Shape(300.0, 1),), lr=2e-6,
        acoustic_delay=1, steps=30_000, warmup_steps=500,
    ),
    "finetune": LmStage(
        name="finetune", mix=(), shapes=(Shape(100.0, 1),), lr=2e-6, steps=2000, warmup_steps=100,
    ),
}  # fmt: skip
