"""The recipe of photographs: its networks, how it reads packages, and what it cuts out of a picture."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdcache.config import parse_config
from kdcache.taps import run
from kdcache.train.config import TrainConfig
from pipelines.efficientnet.networks import Convolution, Lite, published, scaled
from pipelines.efficientnet.photographs import distinct, opened, resources, squares
from pipelines.efficientnet.recipe import FEATURES, VARIANTS, first_choices
from pipelines.weights import read_tensors


@pytest.fixture(scope="module")
def lite0() -> Lite:
    torch.manual_seed(0)
    return Lite("lite0").eval()


def noise(side: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.NEAREST)


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "png")
    return stream.getvalue()


def qt_file(contents: list[bytes], *, claimed: int | None = None) -> bytes:
    data = b"".join(struct.pack(">I", len(one) if claimed is None else claimed) + one for one in contents)
    return struct.pack(">4s4I", b"qres", 3, 20 + len(data), 20, 24 + len(data)) + data + b"treenames"


def old_checkpoint(state: Any, path: Path) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def test_a_checkpoint_from_before_zip_files_is_read_without_unpickling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 4), torch.nn.BatchNorm1d(3)).state_dict()
    state["part"] = torch.arange(24.0).reshape(4, 6)[1:3, ::2]
    found = read_tensors(old_checkpoint(state, tmp_path / "a.pth"))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert np.array_equal(found[name], tensor.numpy())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


def test_an_old_checkpoint_that_would_run_something_is_refused(tmp_path: Path) -> None:
    path = old_checkpoint({"weight": torch.zeros(3), "evil": Evil(tmp_path / "made")}, tmp_path / "a.pth")
    with pytest.raises((ValueError, KeyError, IndexError)):
        read_tensors(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kept", [0, 5, 100, -1, -40])
def test_an_old_checkpoint_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    path = old_checkpoint({"weight": torch.arange(20.0)}, tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises((ValueError, KeyError, IndexError)):
        read_tensors(path)


def test_the_networks_are_of_the_published_sizes(lite0: Lite) -> None:
    counts = [sum(one.numel() for one in model.parameters()) for model in (lite0, Lite("lite2"))]
    assert counts == [4_652_008, 6_092_072]
    assert [scaled(channels, 1.1) for channels in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 48, 88, 120, 208, 352]


@pytest.mark.parametrize(("size", "kernel"), [(6, 3), (7, 3), (6, 5), (7, 5)])
def test_a_stride_of_two_leaves_half_the_places_rounded_up(size: int, kernel: int) -> None:
    made = Convolution(1, 1, kernel, 2)(torch.zeros(2, 1, size, size))
    assert made.shape == (2, 1, (size + 1) // 2, (size + 1) // 2)


def test_published_weights_are_found_by_their_order(lite0: Lite, tmp_path: Path) -> None:
    state = {f"_other.{number}": values for number, values in enumerate(lite0.state_dict().values())}
    found = published(old_checkpoint(state, tmp_path / "a.pth"), "lite0")
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(found(pixels), lite0(pixels))


def test_a_student_of_half_the_side_sees_means_of_four_pixels(lite0: Lite) -> None:
    shrinking = Lite("lite0", shrink=2).eval()
    shrinking.load_state_dict(lite0.state_dict())
    small = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.inference_mode():
        large = shrinking(small.repeat_interleave(2, 2).repeat_interleave(2, 3))
        torch.testing.assert_close(large, lite0(small))


def test_settled_batch_norms_learn_their_weights_and_keep_their_means() -> None:
    torch.manual_seed(0)
    model = Lite("lite0", classes=4, shrink=2, settled=True).train()
    norm = model.stem[1]
    assert isinstance(norm, torch.nn.BatchNorm2d)
    model(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)).sum().backward()
    assert model.training
    assert norm.weight.grad is not None
    assert not norm.running_mean.any()


def test_the_features_of_variants_are_in_the_store(lite0: Lite) -> None:
    pixels = {"pixels": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}
    kept = {one["name"]: one["tap"] for one in FEATURES}
    pairs = [pair for one in VARIANTS.values() for pair in one["loss"].get("hidden", ())]
    with torch.inference_mode():
        told = run(lite0, pixels, [*kept.values(), *(pair["student"] for pair in pairs)])[1]
    assert {pair["teacher"] for pair in pairs} == set(kept)
    assert all(values.shape == (1, 1280) for values in told.values())


def test_every_variant_is_a_config() -> None:
    for changed in VARIANTS.values():
        parse_config(TrainConfig, {"student": {"factory": "a:b"}, **changed})
    assert VARIANTS["hard labels"] == {"loss": {"alpha": 0.0}}


def test_the_first_choice_stands_for_a_label(lite0: Lite) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    with torch.inference_mode():
        logits = lite0(torch.from_numpy(pixels))
    assert first_choices(lite0, pixels).tolist() == logits.argmax(1).tolist()


def test_resources_are_read_one_after_the_other() -> None:
    contents = [b"first", b"", b"RIFF...."]
    assert list(resources(qt_file(contents))) == contents


def test_resources_beyond_their_part_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        list(resources(qt_file([b"first"], claimed=6)))
    with pytest.raises(ValueError, match="no Qt resource"):
        list(resources(b"PNG " + bytes(40)))


def test_what_is_transparent_is_white() -> None:
    picture = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(opened(png(picture))).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_picture_counts_once_and_small_or_even_ones_do_not() -> None:
    picture = noise(80, 0)
    pictures = {
        "one": picture,
        "another": noise(80, 1),
        "smaller": picture.resize((70, 70)),
        "small": noise(40, 2),
        "even": Image.new("RGB", (80, 80), "white"),
    }
    assert list(distinct(pictures)) == ["one", "another"]


def test_squares_begin_with_the_middle_and_stay_inside() -> None:
    values = np.zeros((40, 90, 3), dtype=np.uint8)
    values[:, 25:65] = np.random.default_rng(0).integers(100, 256, (40, 40, 3))
    picture = Image.fromarray(values)
    made = squares(picture, 6, 40, np.random.default_rng(0))
    assert made.shape == (6, 3, 40, 40)
    assert np.array_equal(made[0].transpose(1, 2, 0), values[:, 25:65])
    assert np.array_equal(made, squares(picture, 6, 40, np.random.default_rng(0)))
    assert len({one.tobytes() for one in made}) == 6
