"""The teacher is given its next batch before the host looks at the last one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.capture import CaptureProgress, SamplesProgress, capture
from kdcache.capture.config import CaptureConfig
from kdcache.capture.flight import Flight
from kdcache.config import parse_config
from kdcache.store import check, open_store
from kdcache.targets.measure import measure
from kdcache.teachers import TeacherConfig
from kdcache.teachers.callable import CallableTeacher
from tests import tiny


def test_the_next_batch_is_launched_before_the_last_one_lands(tmp_path: Path) -> None:
    events: list[str] = []

    def successor(ids: Tensor, mask: Tensor) -> Tensor:
        events.append("launch")
        return torch.nn.functional.one_hot((ids + 1) % 300, 300).float() * 9

    def landed(state: CaptureProgress | SamplesProgress) -> None:
        if isinstance(state, CaptureProgress):
            events.append("land")

    tree = tiny.capture_tree(tmp_path)
    tree["teacher"]["batch_positions"] = 64
    tree["store"] = {"preset": "raw", "shard_positions": 256, "chunk_positions": 16}  # its ids need no survey
    teacher = CallableTeacher(TeacherConfig(model="x:y", tokenizer=tree["teacher"]["model"]), successor)
    capture(parse_config(CaptureConfig, tree), tmp_path / "s", teacher=teacher, progress=landed)
    flying, most = 0, 0
    for event in events[1:]:  # the first call asks for the vocabulary's size
        flying += 1 if event == "launch" else -1
        most = max(most, flying)
    assert flying == 0
    assert most == 2
    assert check(open_store(tmp_path / "s")) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_flies_from_a_gpu_lands_unchanged() -> None:
    logits = torch.randn(512, 4096, device="cuda")
    labels = torch.randint(0, 4096, (512,), device="cuda")
    targets = measure(logits, labels, k=16)
    flight = Flight.of(targets, {"1": logits[:, :64]})
    flight.wait()
    assert flight.targets.ids.is_pinned()
    assert torch.equal(flight.targets.ids, targets.ids.cpu())
    assert torch.equal(flight.targets.tail, targets.tail.cpu())
    assert torch.equal(flight.hidden["1"], logits[:, :64].cpu())
