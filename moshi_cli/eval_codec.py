"""Recordings of `moshi eval codec`: through the codec and back, compared, kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from moshi_cli.batch import Result
from moshi_cli.core.errors import InputError, UsageError
from moshi_cli.eval_items import reader
from moshi_cli.eval_jobs import Evaluation, Row
from moshi_cli.inputs import Item

if TYPE_CHECKING:
    from torch import Tensor

    from moshi_cli.core.mimi import Mimi
    from moshi_cli.tasks.evaluation import Figure
    from moshi_cli.tasks.fidelity import Measure
    from moshi_cli.tasks.roundtrip import Passage

ORIGINAL = ".original.wav"


def sound_of(run: Evaluation, item: Item, channel: str) -> Tensor:
    """The whole of an item, float32 [S] at 24 kHz. InputError."""
    import torch

    if problem := item.record.get("problem"):
        raise InputError(str(problem))
    feed = run.feed(item, channel=channel, **reader(item), chunk_frames=100)
    return torch.cat(list(feed), 1)[0, : feed.samples]


class Passages:
    """All recordings of one command line."""

    def __init__(
        self, run: Evaluation, mimi: Mimi, counts: Sequence[int], measures: dict[str, Measure],
        channel: str, shift_s: float,
    ) -> None:  # fmt: skip
        from moshi_cli.tasks import codec
        from moshi_cli.tasks.roundtrip import Roundtrip

        self.run, self.mimi, self.counts = run, mimi, tuple(counts)
        self.measures, self.channel = measures, channel
        shift = round(shift_s * mimi.sample_rate)
        self.roundtrip = Roundtrip(mimi, counts, run.options.batch_size, shift)
        self.info = codec.describe(mimi, max(counts))
        self.settings: dict[str, Any] = {
            "codec": self.info.codec, "codebooks": self.counts,
            "measures": sorted(measures), "channel": channel, "shift_s": shift_s,
        }  # fmt: skip

    def __call__(self, items: Iterator[Item]) -> Iterator[Result]:
        """The `work` of a Run: groups of items, as many as fit at a time."""
        while group := list(islice(items, self.run.options.batch_size)):
            began = time.monotonic()
            wavs: dict[int, Tensor] = {}
            for i, item in enumerate(group):
                try:
                    wavs[i] = sound_of(self.run, item, self.channel)
                except (InputError, UsageError) as error:
                    yield Result(item, error=error)
            passages = self.roundtrip(list(wavs.values())) if wavs else []
            seconds = (time.monotonic() - began) / max(len(wavs), 1)
            for i, passage in zip(wavs, passages, strict=True):
                fields = self.row(group[i], wavs[i], passage)
                audio_s = len(wavs[i]) / self.mimi.sample_rate
                yield Result(group[i], [], audio_s, seconds, fields=fields)

    def row(self, item: Item, wav: Tensor, passage: Passage) -> Row:
        """What is measured on a recording; its sound and codes as files."""
        from moshi_cli.core.audio import write
        from moshi_cli.tasks.codes_writer import CodesWriter
        from moshi_cli.tasks.fidelity import compare

        run = self.run
        passes: dict[str, Row] = {}
        original = run.destination.path(item, ORIGINAL)
        write(original, wav)
        for n, decoded in passage.decoded.items():
            path = run.destination.path(item, f".{n}.wav")
            write(path, decoded.wav)
            passes[str(n)] = {
                "audio": run.relative(path), "same": decoded.same, "frames": decoded.frames,
                **compare(wav, decoded.wav, self.measures),
            }  # fmt: skip
        with CodesWriter(run.destination.path(item, ".mimi"), self.info, "mimi") as codes:
            codes.write(passage.codes, len(wav))
        row: Row = {"audio": run.relative(original), "codes": run.relative(codes.name)}
        if "text" in item.record:
            row["reference"] = item.record["text"]
        if passage.later is not None:
            row["later"] = asdict(passage.later)
        return row | {"passes": passes}

    def sounds(self, row: Row) -> Mapping[str, str]:
        """What a judge hears, if it is known what is said."""
        if "reference" not in row:
            return {}
        decoded = {n: found["audio"] for n, found in row["passes"].items()}
        return {"original": row["audio"], **decoded}

    def figures(self) -> dict[str, Figure]:
        """What the codec as such is like: bit rate, use and entropy of its codebooks."""
        import torch

        from moshi_cli.tasks.codebooks import entropy_bits, histogram, usage
        from moshi_cli.tasks.codes_reader import CodesReader
        from moshi_cli.tasks.evaluation import Figure

        size, counts = self.info.codebook_size, None
        for row in self.run.good():
            with CodesReader(str(self.run.folder / row["codes"])) as blocks:
                here = histogram(torch.cat(list(blocks), 1), size)
            counts = here if counts is None else counts + here
        if counts is None:
            return {}
        frames, rate = int(counts[0].sum()), self.mimi.frame_rate
        entropy, used = entropy_bits(counts).tolist(), usage(counts).tolist()
        found = {}
        for n in self.counts:
            end = f"@{n}" if len(self.counts) > 1 else ""
            found[f"bitrate{end}"] = Figure(
                rate * n * self.info.code_bits, unit="bit/s", count=frames
            )
            found[f"entropy_rate{end}"] = Figure(
                rate * sum(entropy[:n]), unit="bit/s", count=frames
            )
        for q, (bits, share) in enumerate(zip(entropy, used, strict=True), 1):
            found[f"entropy_q{q}"] = Figure(bits, unit="bit", count=frames)
            found[f"usage_q{q}"] = Figure(share, unit="share", count=frames)
        return found
