"""A small OpenAI-compatible server on the loopback address: a real model behind real HTTP, with faults to switch on."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kdcache.teachers._spelling import is_text
from kdcache.tokenizer import token_bytes
from tests import tiny


def save_talker(folder: Path) -> Path:
    """Write the tiny teacher, whose likeliest tokens are mostly whole characters, as of a model trained on text."""
    tiny.save_teacher(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    parts = [number for number, one in enumerate(token_bytes(tiny.tokenizer())) if not is_text(one)]
    with torch.no_grad():
        model.lm_head.weight[parts] *= 0.65
    model.save_pretrained(folder)
    return folder


@dataclass
class Faults:
    """What is wrong with the server, or merely its own way.

    Attributes:
        busy: So many requests are answered with 429, and asked to come back after `retry_after`.
        broken: So many requests are answered with 500.
        refuses_ids: Prompts of token ids get this status; 0 takes them.
        refuses_zero: To generate nothing.
        strict: Arguments that OpenAI does not know are refused.
        by_id: Names tokens by ids when asked to, as vLLM does.
        prompt_logprobs: Also answers in vLLM's own form.
        early: Tells of each token what it expects after it, as llama-cpp-python does.
        begins: Puts the begin token before a text and leaves it out of the echo.
        cuts: Another tokenizer's ids are reported for texts.
        noise: Added to the log-probabilities, another number at every request.
        scale: On the logits, before they are made log-probabilities; 0 gives the logits themselves.
        cap: Log-probabilities that it gives at most.
        key: Without this bearer token it says 401, and repeats what it was sent.
        mute: It echoes nothing, as llama.cpp's own server does.
        down: Every request is cut off.
        context: What it says is the model's longest input.
    """

    busy: int = 0
    retry_after: str = "0.01"
    broken: int = 0
    refuses_ids: int = 0
    refuses_zero: bool = True
    strict: bool = False
    by_id: bool = False
    prompt_logprobs: bool = False
    early: bool = False
    begins: bool = False
    cuts: bool = False
    noise: float = 0.0
    scale: float = 1.0
    cap: int = 1 << 20
    key: str = ""
    mute: bool = False
    down: bool = False
    context: int | None = None


@dataclass
class Server:
    """A model that is served while the context is open.

    Attributes:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        faults: May be changed while it runs.
        requests: What it was asked, in order of arrival.
    """

    model: Any
    tokenizer: Any
    faults: Faults = field(default_factory=Faults)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def __enter__(self) -> "Server":
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def refusal(self, body: dict[str, Any] | None) -> tuple[int, str] | None:
        """Return the status and reason with which a request is refused, if it is."""
        faults = self.faults
        with self._lock:
            if faults.busy:
                faults.busy -= 1
                return 429, "slow down"
            if faults.broken and body is not None:
                faults.broken -= 1
                return 500, "something broke"
        if body is None:
            return None
        if faults.refuses_ids and not isinstance(body["prompt"], str):
            return faults.refuses_ids, "prompt: input should be a valid string"
        if faults.refuses_zero and body["max_tokens"] == 0:
            return 400, "max_tokens must be at least 1"
        if faults.strict and (unknown := [one for one in body if one.startswith("return_")]):
            return 400, f"Unrecognized request argument supplied: {unknown[0]}"
        return None

    def listed(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"id": "tiny", "object": "model", "owned_by": "tests"}
        if self.faults.context:
            entry["max_model_len"] = self.faults.context
        return {"object": "list", "data": [entry]}

    @torch.no_grad()
    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        faults, prompt = self.faults, body["prompt"]
        hidden = 0
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            if faults.begins:
                ids, hidden = [self.tokenizer.bos_token_id, *ids], 1
            if faults.cuts and len(ids) > 50:
                ids = [*ids[:-1], 7, 7]
        else:
            ids = list(prompt)
        logits = self.model(torch.tensor([ids])).logits[0].float()
        rows = logits if faults.scale == 0 else torch.log_softmax(logits * faults.scale, -1)
        rows = rows + faults.noise * len(self.requests)
        new = int(rows[-1].argmax())
        named = faults.by_id and bool(body.get("return_tokens_as_token_ids"))
        echo, count = bool(body.get("echo")) and not faults.mute, min(body["logprobs"], faults.cap)
        tokens = (ids if echo else []) + [new] * body["max_tokens"]
        first = 0 if echo else len(ids)
        entries = []
        for place, token in enumerate(tokens):
            row = first + place - 1 + (1 if faults.early and echo else 0)
            entries.append(self._entry(rows[row], token, count, named) if 0 <= row < len(rows) else None)
        if faults.early and echo:
            entries[0] = None
            tokens, entries = tokens[: len(ids)], entries[: len(ids)]
        said = {
            "tokens": [self._name(token, named) for token in tokens][hidden if echo else 0 :],
            "token_logprobs": [None if one is None else one[0] for one in entries][hidden if echo else 0 :],
            "top_logprobs": [None if one is None else one[1] for one in entries][hidden if echo else 0 :],
        }
        if hidden and echo:
            said["token_logprobs"][0] = said["top_logprobs"][0] = None
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": said}
        if faults.prompt_logprobs:
            choice["prompt_logprobs"] = [None, *(self._by_id(rows[t], ids[t + 1], count) for t in range(len(ids) - 1))]
        usage = {"prompt_tokens": len(ids), "completion_tokens": body["max_tokens"]}
        return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}

    def _entry(self, row: torch.Tensor, token: int, count: int, named: bool) -> tuple[float, dict[str, float]]:
        # as vLLM: the token itself first, then the likeliest; equal texts fall together
        own = max(float(row[token]), -9999.0)
        likeliest = row.topk(count).indices.tolist()
        return own, {
            self._name(token, named): own,
            **{self._name(one, named): max(float(row[one]), -9999.0) for one in likeliest},
        }

    def _by_id(self, row: torch.Tensor, token: int, count: int) -> dict[str, dict[str, Any]]:
        chosen: Sequence[int] = [token, *row.topk(count).indices.tolist()]
        return {
            str(one): {
                "logprob": float(row[one]),
                "rank": int((row >= row[one]).sum()),
                "decoded_token": self._name(one, False),
            }
            for one in chosen
        }

    def _name(self, token: int, named: bool) -> str:
        return f"token_id:{token}" if named else str(self.tokenizer.decode([token]))


class _Handler(BaseHTTPRequestHandler):
    server_of: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_of.requests.append(body)
        self._answer(body)

    def _answer(self, body: dict[str, Any] | None) -> None:
        server = self.server_of
        server.headers.append(dict(self.headers))
        if server.faults.down:
            self.close_connection = True
            return
        said = self.headers.get("Authorization", "")
        if server.faults.key and said != f"Bearer {server.faults.key}":
            self._send(401, {"error": {"message": f"Incorrect API key provided: {said}"}})
        elif refused := server.refusal(body):
            self._send(refused[0], {"error": {"message": f"{refused[1]} ({said})"}})
        elif self.path.split("?")[0] != ("/v1/models" if body is None else "/v1/completions"):
            self._send(404, {"error": {"message": f"no such path: {self.path}"}})
        else:
            self._send(200, server.listed() if body is None else server.completion(body))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", self.server_of.faults.retry_after)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
