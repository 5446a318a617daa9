"""The student as the folder that transformers loads: the weights alone, without what resumes its training."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from kdcache.export.finished import Finished, Plain, torch_logits
from kdcache.export.measure import compare
from kdcache.export.written import Written

TOLERANCE = 1e-6
"""The weights are the same bits; a matrix product may still be added up in another order."""


def plugin(student: Finished, folder: Path) -> Written:
    """Write `save_pretrained`'s folder; of a student made by a factory, its model.safetensors.

    Raises:
        MismatchError: Read back, it says something else.
    """
    from safetensors.torch import load_model, save_model

    model: Any = student.model
    notes: tuple[str, ...] = ()
    if hasattr(model, "save_pretrained"):
        from transformers import AutoModelForCausalLM

        model.save_pretrained(folder)
        back = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True)
    else:
        save_model(model, str(folder / "model.safetensors"))
        back = deepcopy(model)
        load_model(back, str(folder / "model.safetensors"))
        notes = ("The student was made by a factory, which is needed to load it again.",)
    run = torch_logits(Plain(back.float()))
    return Written("safetensors", run, compare(student, run, tolerance=TOLERANCE), notes)
