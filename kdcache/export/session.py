"""onnxruntime: a graph on disk as a function from token ids to logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.export.finished import Logits

ONLY_FATAL = 4
"""onnxruntime's log level; what goes wrong is raised as well."""


def open_session(path: Path) -> Logits:
    """Return a graph's forward pass on the CPU, with as many threads as torch uses.

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ONLY_FATAL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}

    def run(input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        # a student that ignores its mask has a graph without one
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        out: NDArray[np.float32] = session.run(["logits"], {name: given[name] for name in given if name in taken})[0]
        return out

    return run


def load_onnxruntime() -> Any:
    """Return onnxruntime, once onnx, which writes what it reads, is there too.

    Raises:
        ConfigError: One of them is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"This export needs the package {error.name}.", hint="Run: pip install 'kdcache[export]'"
        ) from error
    return onnxruntime
