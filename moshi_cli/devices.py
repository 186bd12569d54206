"""Microphone and loudspeaker, through the optional package sounddevice.

Both speak 24 kHz mono frames; a device that cannot is resampled. DeviceError (exit code 6) for
whatever is missing or refuses.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moshi_cli.core.errors import DeviceError

if TYPE_CHECKING:
    from torch import Tensor

RATE, FRAME = 24_000, 1920
PATIENCE_S = 0.5  # how long to wait for a frame before looking whether the user pressed Ctrl-C


def sounddevice() -> Any:
    """The package, or a DeviceError that says how to get it."""
    try:
        import sounddevice
    except ImportError:
        raise DeviceError(
            "microphone and loudspeakers need the package sounddevice", "pip install sounddevice"
        ) from None
    except OSError as error:
        raise DeviceError(
            f"sounddevice does not work here ({error})", "install PortAudio, e.g. libportaudio2"
        ) from None
    return sounddevice


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Errors of PortAudio in one sentence."""
    sd = sounddevice()
    try:
        yield
    except (sd.PortAudioError, ValueError) as error:
        text = " ".join(str(error).split())
        raise DeviceError(f"{what}: {text}", "--list-devices shows what there is") from None


def device_name(name: str | None) -> str | int | None:
    """A device by number or by part of its name; None: the default."""
    return int(name) if name is not None and name.isdecimal() else name


def list_devices() -> str:
    """One line per device, as PortAudio numbers them."""
    with refusals("devices"):
        return str(sounddevice().query_devices())


def usable_rate(sd: Any, kind: str, device: str | int | None) -> int:
    """24 kHz where the device can do it, else its own rate."""
    check = sd.check_input_settings if kind == "input" else sd.check_output_settings
    try:
        check(device=device, channels=1, dtype="float32", samplerate=RATE)
    except (sd.PortAudioError, ValueError):
        return round(sd.query_devices(device, kind)["default_samplerate"])
    return RATE


class Microphone:
    """An endless iterator of frames float32 [1, 1920], each when it has been spoken.

    `late` counts frames that wait; with drop=True the oldest of them are dropped beyond half a
    second, and `dropped` counts those.
    """

    live, channels, total_s, name = True, 1, None, "microphone"

    def __init__(self, device: str | None = None, *, drop: bool = False) -> None:
        from moshi_cli.core.audio import Resampler

        sd = sounddevice()
        self.samples = self.dropped = 0
        self.drop, self.stopped = drop, False
        self.waiting: queue.Queue[Any] = queue.Queue()
        with refusals("microphone"):
            rate = usable_rate(sd, "input", device_name(device))
            self.resampler = Resampler(rate)
            self.stream = sd.InputStream(
                samplerate=rate, blocksize=round(rate * FRAME / RATE), channels=1, dtype="float32",
                device=device_name(device), callback=self._heard,
            )  # fmt: skip
            self.stream.start()
        self.held: Any = None

    def _heard(self, block: Any, frames: int, when: Any, status: Any) -> None:
        self.waiting.put(block.copy())

    @property
    def late(self) -> int:
        """Frames that wait to be used."""
        return self.waiting.qsize()

    def __iter__(self) -> Microphone:
        return self

    def __next__(self) -> Tensor:
        import numpy as np
        import torch

        held = self.held if self.held is not None else np.zeros((0, 1), np.float32)
        while len(held) < FRAME:
            while self.drop and self.late > 6:
                self.waiting.get()
                self.dropped += 1
            try:
                block = self.waiting.get(timeout=0 if self.stopped else PATIENCE_S)
            except queue.Empty:
                if self.stopped:
                    break
            else:
                held = np.concatenate([held, self.resampler(block)])
        if not len(held):
            raise StopIteration
        frame, self.held = held[:FRAME], held[FRAME:]
        self.samples += len(frame)
        return torch.from_numpy(np.pad(frame, ((0, FRAME - len(frame)), (0, 0))).T.copy())

    def stop(self) -> None:
        """No more sound."""
        if not self.stopped:
            self.stopped = True
            with refusals("microphone"):
                self.stream.close()


class Loudspeaker:
    """Plays frames float32 [1, S] in turn; `write` waits while the device is busy with others."""

    name = "loudspeaker"

    def __init__(self, device: str | None = None) -> None:
        from moshi_cli.core.audio import Resampler

        sd = sounddevice()
        self.samples = self.clipped = 0
        with refusals("loudspeaker"):
            rate = usable_rate(sd, "output", device_name(device))
            self.resampler = Resampler(RATE, to=rate)
            self.stream = sd.OutputStream(
                samplerate=rate, channels=1, dtype="float32", device=device_name(device)
            )
            self.stream.start()

    def write(self, pcm: Tensor) -> None:
        """Play it after what is playing."""
        block = pcm.detach().float().cpu().reshape(-1, 1).clamp(-1, 1).numpy()
        self.samples += len(block)
        with refusals("loudspeaker"):
            self.stream.write(self.resampler(block))

    def close(self) -> None:
        """Play to the end."""
        with refusals("loudspeaker"):
            self.stream.stop()
            self.stream.close()

    def abort(self) -> None:
        """Fall silent."""
        with refusals("loudspeaker"):
            self.stream.abort()
            self.stream.close()
