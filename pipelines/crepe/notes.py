"""Recorded notes of a sound font, cut to frames whose pitch is known.

Legend: `F` frames.

A sound font (SF2) maps keys to recordings: the zone of an instrument says at which key its recording sounds as it is,
and how many cents it is off. That is the truth here; the header of each recording has a key too, which is 60 for most.
"""

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE, FRAME = 16000, 1024
"""Samples a second and a frame, of the teacher."""

COARSE, FINE, INSTRUMENT, SCALE, SAMPLE, ROOT = 51, 52, 41, 56, 53, 58
"""Numbers of generators in the format: semitones, cents, links, cents a key, and the key of the recording."""

MONO, LEFT = 1, 4
"""Kinds of recordings that are used: the right channels would be the same notes again."""

MELODIC = range(112)
"""Programs with a pitch; the later ones are percussion and noises."""


@dataclass(frozen=True, slots=True)
class Note:
    """One recording.

    Attributes:
        name: In the sound font.
        program: The lowest program that uses it, 0 to 111.
        key: Its pitch in semitones, 69 is 440 Hz.
        start: Its first sample in the sound font.
        stop: After its last.
        rate: Samples a second.
    """

    name: str
    program: int
    key: float
    start: int
    stop: int
    rate: int


class SoundFont:
    """The notes of an SF2 file of 16-bit samples.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        self._chunks = dict(self._walk(12, len(self._data)))
        start, size = self._chunks["smpl"]
        self._samples = self._data[start : start + size].view("<i2")

    def notes(self) -> list[Note]:
        """Return the recordings of melodic programs on which all instruments agree, in the file's order."""
        programs = self._programs()
        keys = defaultdict[int, set[float]](set)
        users = defaultdict[int, set[int]](set)
        for instrument, sample, zone in self._zones("inst", "<20sH", "ibag", "igen", SAMPLE):
            if instrument not in programs or zone.get(SCALE, 100) != 100 or ROOT not in zone:
                continue
            keys[sample].add(zone[ROOT] - _signed(zone.get(COARSE, 0)) - _signed(zone.get(FINE, 0)) / 100)
            users[sample] |= programs[instrument]
        found = []
        for number, row in enumerate(self._rows("shdr", "<20sIIIIIBbHH")[:-1]):
            name, start, stop, _, _, rate, _, correction, _, kind = row
            same = keys[number] and max(keys[number]) - min(keys[number]) < 0.5
            if same and kind in (MONO, LEFT) and users[number] <= set(MELODIC):
                key = float(np.median(list(keys[number]))) - correction / 100
                found.append(Note(_text(name), min(users[number]), key, start, stop, rate))
        return found

    def sound(self, note: Note, seconds: float) -> NDArray[np.float64]:
        """Return the first seconds of a note at 16 kHz, by cutting its spectrum at 8 kHz."""
        stop = min(note.stop, note.start + round(seconds * note.rate))
        values = self._samples[note.start : stop].astype(np.float64) / 32768
        length = len(values) * RATE // note.rate
        spectrum = np.fft.rfft(values)
        kept = np.zeros(length // 2 + 1, dtype=complex)
        count = min(len(kept), len(spectrum))
        kept[:count] = spectrum[:count]
        return np.fft.irfft(kept, length) * length / len(values)

    def frames(self, note: Note, count: int) -> NDArray[np.float32]:
        """Return up to `count` frames [F, 1024] from 0.1 to 1 s of a note, each with mean 0 and deviation 1.

        Fewer where the note is short, or too soft: 40 dB below its loudest.
        """
        sound = self.sound(note, 1.1)
        first, last = RATE // 10, min(len(sound), RATE) - FRAME
        if last < first:
            return np.zeros((0, FRAME), dtype=np.float32)
        starts = np.unique(np.linspace(first, last, count).astype(int))
        frames = np.stack([sound[at : at + FRAME] for at in starts])
        frames -= frames.mean(1, keepdims=True)
        loud = frames.std(1)
        frames = frames[loud > max(1e-2 * np.abs(sound).max(), 1e-5)]
        return (frames / frames.std(1, keepdims=True)).astype(np.float32)

    def _walk(self, at: int, stop: int) -> Iterator[tuple[str, tuple[int, int]]]:
        while at + 8 <= stop:
            name, size = struct.unpack("<4sI", self._data[at : at + 8].tobytes())
            if name == b"LIST":
                yield from self._walk(at + 12, at + 8 + size)
            else:
                yield name.decode(), (at + 8, size)
            at += 8 + size + size % 2

    def _rows(self, chunk: str, layout: str) -> list[tuple[Any, ...]]:
        start, size = self._chunks[chunk]
        return list(struct.iter_unpack(layout, self._data[start : start + size].tobytes()))

    def _zones(
        self, owners: str, layout: str, bags: str, generators: str, link: int
    ) -> Iterator[tuple[int, int, dict[int, int]]]:
        """Yield owner, what it links to, and the generators of each zone; a first zone without a link is for all."""
        begins = [row[-1] if owners == "inst" else row[3] for row in self._rows(owners, layout)]
        places = [row[0] for row in self._rows(bags, "<HH")]
        values = self._rows(generators, "<HH")
        for owner, (first, last) in enumerate(pairwise(begins)):
            shared: dict[int, int] = {}
            for bag in range(first, last):
                zone = dict(values[places[bag] : places[bag + 1]])
                if link in zone:
                    yield owner, zone[link], {**shared, **zone}
                elif bag == first:
                    shared = zone

    def _programs(self) -> dict[int, set[int]]:
        """Return the programs that use each instrument; those of other banks, such as drums, count as 128."""
        heads = self._rows("phdr", "<20sHHHIII")
        found = defaultdict[int, set[int]](set)
        for preset, instrument, _ in self._zones("phdr", "<20sHHHIII", "pbag", "pgen", INSTRUMENT):
            _, program, bank, *_ = heads[preset]
            found[instrument].add(program if bank < 128 else 128)
        return dict(found)


def _signed(word: int) -> int:
    return word - 65536 if word >= 32768 else word


def _text(name: bytes) -> str:
    return name.split(b"\0")[0].decode("latin-1").strip()
