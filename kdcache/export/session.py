"""onnxruntime: a graph on disk as a function from inputs to logits."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import ConfigError, MismatchError
from kdcache.export.trial import Inputs, Run

ONLY_FATAL = 4
"""onnxruntime's log level; what goes wrong is raised as well."""


def open_session(path: Path) -> Run:
    """Return a graph's forward pass on the CPU, with as many threads as torch uses.

    The pass raises MismatchError where its logits are of another size than the graph says that they are: exporters
    write down a length that they have seen, and who reads the graph believes it.

    Raises:
        ConfigError: onnxruntime is not installed.
    """
    runtime = load_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ONLY_FATAL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # a student that ignores its mask has a graph without one
    taken = [one.name for one in session.get_inputs()]
    declared = next(one.shape for one in session.get_outputs() if one.name == "logits")

    def run(inputs: Inputs) -> NDArray[np.float32]:
        out: NDArray[np.float32] = session.run(["logits"], {name: inputs[name] for name in taken})[0]
        if any(isinstance(said, int) and said != size for said, size in zip(declared, out.shape, strict=False)):
            raise MismatchError(f"The graph says that it gives {declared}, and gives {list(out.shape)}.")
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
