"""The student as the folder that transformers loads: the weights alone, without what resumes its training."""

from pathlib import Path
from typing import Any

from kdcache.export.finished import Finished
from kdcache.export.measure import compare
from kdcache.export.trial import Plain
from kdcache.export.written import Written

TOLERANCE = 1e-6
"""The weights are the same bits; a matrix product may still be added up in another order."""


def plugin(student: Finished, folder: Path) -> Written:
    """Write `save_pretrained`'s folder; of a student made by a factory, its model.safetensors.

    Raises:
        MismatchError: Read back, it says something else.
        AccessError: It does not load.
    """
    from safetensors.torch import save_model

    model: Any = student.model
    notes: tuple[str, ...] = ()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
        notes = ("The student was made by a factory, which is needed to load it again.",)
    run = Plain(student.reload(folder).float(), student.trial).run
    return Written("safetensors", run, compare(student, run, tolerance=TOLERANCE), notes)
