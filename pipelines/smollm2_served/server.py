"""A causal language model behind OpenAI's `/v1/completions`, as a service would serve it; loopback only.

    python -m pipelines.smollm2_served.server FOLDER [--port 8000]

Enough of the interface to be asked about given tokens: ids as a prompt, `echo`, `logprobs` of up to 20 candidates,
named by their ids as vLLM does it. Any server that does the same can stand in its place.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

MOST = 20
"""Candidates of a position at most."""


class Served:
    """A model, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
        self._one_at_a_time = threading.Lock()  # more would only share the same cores

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request whose prompt is one list of ids; the next token is the likeliest one."""
        ids, count = [int(one) for one in body["prompt"]], min(int(body.get("logprobs") or 1), MOST)
        with self._one_at_a_time:
            rows = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        found = rows.topk(count)
        candidates = [
            {_name(one): value for one, value in zip(*both, strict=True)}
            for both in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
        after = int(found.indices[-1, 0])
        said = [*ids, after] if body.get("echo") else [after]
        first = 0 if body.get("echo") else len(ids)
        own: list[Any] = []
        for place, token in enumerate(said, start=first - 1):
            own.append((None, None) if place < 0 else (float(rows[place, token]), candidates[place]))
        logprobs = {
            "tokens": [_name(one) for one in said],
            "token_logprobs": [one for one, _ in own],
            "top_logprobs": [one for _, one in own],
        }
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
        return {"object": "text_completion", "model": self.name, "choices": [choice]}


def _name(token: int) -> str:
    return f"token_id:{token}"


def http(served: Served, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the model on the loopback address; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": served.name, "object": "model"}]})

        def do_POST(self) -> None:
            try:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not isinstance(body["prompt"], list) or int(body.get("max_tokens", 1)) != 1:
                    raise ValueError("a prompt of ids, and one token to generate, are what is served")
                self._send(200, served.complete(body))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self._send(400, {"error": {"message": str(error)}})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Serve until stopped."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--port", type=int, default=8000)
    given = arguments.parse_args()
    running = http(Served(given.folder), given.port)
    print(f"http://127.0.0.1:{running.server_port}/v1", flush=True)
    running.serve_forever()


if __name__ == "__main__":
    main()
