"""llama-cpp-python's server as a process of its own, on the model that the demo's package holds."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


def python() -> str | None:
    """The interpreter that has llama_cpp: KDCACHE_LLAMA_PYTHON, or this one; None where neither does."""
    if own := os.environ.get("KDCACHE_LLAMA_PYTHON"):
        return own
    return sys.executable if find_spec("llama_cpp") else None


@contextmanager
def serving(python: str, gguf: Path) -> Iterator[str]:
    """Serve a GGUF file; give the URL once it answers."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    # its log-probabilities need the logits of every token
    settings = {"--model": str(gguf), "--logits_all": "true", "--n_ctx": "256", "--n_threads": "2", "--port": str(port)}
    line = [python, "-m", "llama_cpp.server", *(text for pair in settings.items() for text in pair)]
    job = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + 60
        while job.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{url}/models", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        job.terminate()
        job.wait(timeout=30)
