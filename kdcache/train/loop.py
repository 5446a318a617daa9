"""One process's training run: steps, checkpoints, validation, and an end that is the same whatever interrupted it."""

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from torch import nn

from kdcache.batch import Batch
from kdcache.errors import ConfigError, Interrupted, OutageError, TrainingError
from kdcache.process import peak_memory_bytes, stop_signals
from kdcache.store import Store, open_store
from kdcache.store.disk import storage_errors
from kdcache.store.objects import write_object
from kdcache.stream import Loader, StreamConfig, output_head_of
from kdcache.train import checkpoint
from kdcache.train.average import Average
from kdcache.train.config import Schedule, TrainConfig
from kdcache.train.features import with_pairs
from kdcache.train.feed import Feed
from kdcache.train.objective import Objective, needs
from kdcache.train.record import Record
from kdcache.train.result import RESULT, TrainProgress, TrainResult, tail_of
from kdcache.train.schedule import extremes, learning_rate, value_at
from kdcache.train.spans import held_out_by_text
from kdcache.train.student import build_student, require_finite_weights, save_student
from kdcache.train.teachers import Companions
from kdcache.train.texts import texts_of
from kdcache.train.validate import HeldOut, held_out

NOT_FINITE_LIMIT = 20
"""Successive steps whose loss is not finite before a run gives up."""

SNAPSHOTS, EMA = "snapshots", "ema"
"""Folders of a run's earlier students and of the mean of its weights."""

Transform = Callable[[Batch], Batch]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _State:
    """What a checkpoint carries besides tensors."""

    step: int = 0
    positions: int = 0
    best: float | None = None
    best_step: int = 0
    since_best: int = 0


class Run:
    """One process's part of a training run; `kdcache.train.train` says what goes in and comes out."""

    def __init__(
        self,
        config: TrainConfig,
        store: Store,
        root: Path,
        identity: dict[str, Any],
        progress: Callable[[TrainProgress], None] | None,
        transform: Transform | None,
    ) -> None:
        self._config = config
        self._store = store
        self._root = root
        self._identity = identity
        self._transform = transform
        run = config.run
        # accelerate keeps one state a process: a second run may have another precision
        AcceleratorState._reset_state()
        self._accelerator = Accelerator(mixed_precision=run.precision, cpu=run.device == "cpu")
        if run.device == "cuda" and self._accelerator.device.type != "cuda":
            raise ConfigError("There is no CUDA device.", where="run.device", hint="Use auto or cpu.")
        self._feed = None if store.manifest.kind == "causal_lm" else Feed(store, config.data)
        if self._feed is not None:
            self._feed.require_labels(config.loss)
        several = bool(config.data.teachers) and extremes(config.loss.alpha)[1] > 0
        if several and transform is not None:
            raise ConfigError("The online baseline has one teacher.", where="data.teachers", hint="Leave it out.")
        self._companions = Companions(store, config.data, config.loss) if several else None
        self._texts = texts_of(config, store, live=transform is not None)
        own = None if self._texts is None else self._texts.student.tokenizer
        student = build_student(config.student, store, seed=run.seed, tokenizer=own)
        if self._texts is not None:
            self._texts.fit(student)
        self._outputs = store.vocab_size if self._texts is None else self._texts.vocab_size
        config = config.model_copy(update={"loss": with_pairs(config.loss, store, student)})
        self._config = config
        probe = None if self._feed is None else self._feed.probe()
        weights = (config.data.weight, *(one.weight for one in config.data.teachers))
        live = transform is not None
        self._plain = Objective(
            config.loss, student, store, live=live, probe=probe, teachers=weights, vocab_size=self._outputs
        )
        if run.ema:
            self._plain.average = Average(student, run.ema)
        groups = _groups(self._plain, config.optim.weight_decay)
        # one pass over weights and moments: on a CPU the step of a large vocabulary's student is mostly this one
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.optim.betas, fused=True)
        self._objective, self._optimizer = self._accelerator.prepare(self._plain, optimizer)
        self._loader = Loader(store, self._stream())
        self._per_epoch = -(-len(self._loader) // run.accumulation)
        self._steps = run.steps or run.epochs * self._per_epoch
        wanted = needs(config.loss)
        cached_head = wanted.output_head and transform is None
        self._head = output_head_of(store).to(self._accelerator.device) if cached_head else None
        self._state = _State()
        self._record = Record(root, writes=self._accelerator.is_main_process, progress=progress)
        self._validation: HeldOut | None = None
        self._validated = -1

    def run(self) -> TrainResult:
        """Train to the end, or to the interruption; a checkpoint is there either way."""
        self._root.mkdir(parents=True, exist_ok=True)
        self._resume()
        bad = 0
        stopped_early = False
        batches = self._batches()
        last_saved = self._state.step
        with stop_signals() as stopped:
            while self._state.step < self._steps and not stopped_early:
                before = self._loader.state_dict()
                try:
                    terms = self._step(batches)
                except OutageError:
                    # other ranks may wait for this one for ever: they keep to the last checkpoint
                    if self._accelerator.num_processes == 1 and last_saved != self._state.step:
                        self._loader.load_state_dict(before)
                        self._save()
                    raise
                bad = bad + 1 if terms is None else 0
                if bad >= NOT_FINITE_LIMIT:
                    raise TrainingError(
                        f"The loss was not finite for {bad} steps in a row.",
                        where=f"step {self._state.step}",
                        hint="Lower optim.learning_rate; the last checkpoint is from before.",
                    )
                if self._due(self._config.run.validate_every) and self._config.data.validation:
                    stopped_early = self._validate()
                # before the checkpoint of a stop, from which the run goes on with the next step
                if self._config.run.snapshot_every and self._state.step % self._config.run.snapshot_every == 0:
                    self._save_part(f"{SNAPSHOTS}/step-{self._state.step:08d}", self._plain.student)
                if self._anywhere(stopped.is_set()) and self._state.step < self._steps:
                    self._save()
                    raise Interrupted(
                        f"The run was stopped at step {self._state.step} of {self._steps}; a checkpoint was written.",
                        where=str(self._root),
                        hint="Run the same command again to go on.",
                    )
                if self._due(self._config.run.checkpoint_every) and bad == 0:
                    self._save()
                    last_saved = self._state.step
        if last_saved != self._state.step:
            self._save()
        return self._finish(stopped_early)

    def _step(self, batches: Iterator[tuple[Batch, dict[str, Any]]]) -> dict[str, float] | None:
        """Do one optimiser step; return its terms, or None when the loss was not finite and it was left out."""
        began = time.perf_counter()
        config, step = self._config, self._state.step
        micro = []
        for _ in range(config.run.accumulation):
            batch, epoch_ended = next(batches)
            micro.append(batch)
            if epoch_ended["ended"]:
                break
        waited = time.perf_counter() - began
        device = self._accelerator.device
        counted = torch.tensor(float(sum(int(batch.mask.sum()) for batch in micro)), device=device)
        everywhere = self._accelerator.reduce(counted, reduction="sum")
        # ranks average gradients, so each divides by its share of the positions of all
        positions = max(1.0, float(everywhere)) / self._accelerator.num_processes
        alpha = value_at(config.loss.alpha, step, self._steps)
        set_at = config.loss.temperature
        # the objective knows a temperature that is learned or goes by entropy
        temperature = value_at(set_at, step, self._steps) if isinstance(set_at, float | Schedule) else 1.0
        sums: dict[str, float] = {}
        for number, batch in enumerate(micro):
            here = batch.to(device, non_blocking=True)
            if self._transform is not None:
                here = self._transform(here)
            elif self._head is not None:
                here = replace(here, output_head=self._head)
            last = number == len(micro) - 1
            # ranks exchange gradients only in the last micro-batch of a step
            with nullcontext() if last else self._accelerator.no_sync(self._objective):
                with self._accelerator.autocast():
                    terms = self._objective(here, alpha, temperature, positions)
                self._accelerator.backward(terms["loss"])
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        # of all ranks: each has the gradients of all
        finite = not self._anywhere(not all(math.isfinite(value) for value in sums.values()))
        rate = learning_rate(config.optim, step, self._steps)
        if finite:
            if config.optim.clip_norm:
                self._accelerator.clip_grad_norm_(self._objective.parameters(), config.optim.clip_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
            if self._plain.average is not None:
                self._plain.average.update(self._plain.student)
        self._optimizer.zero_grad(set_to_none=True)
        self._state.step += 1
        self._state.positions += int(everywhere)
        line = {
            "step": self._state.step,
            **{name: round(value, 8) for name, value in sums.items()},
            "learning_rate": rate,
            "alpha": alpha,
            "temperature": self._plain.mean_temperature,
        }
        self._record.step(
            line,
            tokens=sum(batch.num_positions for batch in micro),
            seconds=time.perf_counter() - began,
            waited=waited,
            of=(self._loader.epoch, self._steps),
        )
        return sums if finite else None

    def _batches(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        while True:
            per_epoch = len(self._loader)
            if per_epoch == 0:
                raise ConfigError("The store has fewer samples than a global batch.", where="data.batch_size")
            for read in self._loader:
                # teachers are joined sample by sample, before the feed takes one view of each
                joined = read if self._companions is None else self._companions.fill(read)
                batch = joined if self._feed is None else self._feed.fill(joined, self._loader.epoch)
                batch = batch if self._texts is None else self._texts.fill(batch)
                yield batch, {"ended": self._loader.batches == per_epoch}

    def _validate(self) -> bool:
        """Measure on the held-out store; keep the best student; say whether patience has run out."""
        whole = partial(held_out, data=self._config.data)
        measure = whole if self._texts is None else partial(held_out_by_text, tokenizer=self._texts.student.tokenizer)
        found = measure(
            self._plain.student,
            open_store(str(self._config.data.validation)),
            batch_size=self._config.data.batch_size,
            device=self._accelerator.device,
            chunk=self._config.loss.chunk_positions or None,
        )
        self._validation, self._validated = found, self._state.step
        # ranks may differ in the last bits and in what batch norms have seen: the first one's decides
        value = float(broadcast(torch.tensor(getattr(found, self._config.run.metric), device=self._accelerator.device)))
        self._record.note({"step": self._state.step, "validation": asdict(found)})
        if self._state.best is None or value < self._state.best:
            self._state.best, self._state.best_step, self._state.since_best = value, self._state.step, 0
            if self._config.run.patience and self._accelerator.is_main_process:
                self._save_student(self._root / "best", self._plain.student)
        else:
            self._state.since_best += 1
        return bool(self._config.run.patience) and self._state.since_best >= self._config.run.patience

    def _finish(self, stopped_early: bool) -> TrainResult:
        if self._config.data.validation and not stopped_early and self._validated != self._state.step:
            self._validate()
        result = TrainResult(
            steps=self._state.step,
            epochs=self._loader.epoch + (self._loader.batches > 0),
            positions=self._state.positions,
            **self._record.report(),
            peak_memory_bytes=peak_memory_bytes(),
            accelerator_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            student_parameters=sum(one.numel() for one in self._plain.student.parameters()),
            tail=tail_of(self._config),
            validation=None if self._validation is None else asdict(self._validation),
            stopped_early=stopped_early,
            already_complete=False,
            teacher_in_memory=any(name.startswith(("kdcache.teachers", "kdcache.capture")) for name in sys.modules),
            store_digest=self._store.digest,
        )
        if self._accelerator.is_main_process:
            require_finite_weights(self._plain.student)
            if stopped_early:
                shutil.copytree(self._root / "best", self._root, dirs_exist_ok=True)
            else:
                self._save_student(self._root, self._plain.student)
            if self._plain.average is not None:
                self._save_part(EMA, self._plain.average.averaged(self._plain.student))
            self._write_result(self._root, self._identity, result.as_dict())
        self._accelerator.wait_for_everyone()
        return result

    def _save_student(self, folder: Path, student: nn.Module) -> None:
        files = self._store.tokenizer_files() if self._texts is None else self._texts.files()
        with storage_errors(folder):
            save_student(student, self._config.student, files, folder)

    def _save_part(self, name: str, student: nn.Module) -> None:
        """Write a student of this run besides its last one, in a folder that is used as a finished run's."""
        if self._accelerator.is_main_process:
            self._save_student(self._root / name, student)
            self._write_result(self._root / name, {**self._identity, "part": name}, {"steps": self._state.step})

    def _write_result(self, folder: Path, identity: dict[str, Any], result: dict[str, Any]) -> None:
        config = self._config.model_dump(mode="json")
        document = {"identity": identity, "config": config, "result": result, "outputs": self._outputs}
        write_object(folder, RESULT, json.dumps(document, indent=2).encode())

    def _anywhere(self, happened: bool) -> bool:
        """Say whether something happened in any rank: they go on, leave out and stop together."""
        if self._accelerator.num_processes == 1:
            return happened
        told = torch.tensor(float(happened), device=self._accelerator.device)
        return bool(self._accelerator.reduce(told, reduction="sum") > 0)

    def _due(self, every: int) -> bool:
        """Whether something is due after this step: every so many steps, or (0) at the end of an epoch."""
        return self._state.step % (every or self._per_epoch) == 0

    def _save(self) -> None:
        if self._accelerator.is_main_process:
            scaler = self._accelerator.scaler
            state = {
                **self._identity,
                "run": asdict(self._state),
                "stream": self._loader.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            folder = self._root / "checkpoints"
            checkpoint.save(folder, self._state.step, state, self._plain, _inner(self._optimizer))
        self._accelerator.wait_for_everyone()

    def _resume(self) -> None:
        found = checkpoint.latest(self._root / "checkpoints", self._identity)
        if found is None:
            self._record.begin(0)
            return
        checkpoint.restore(found, self._plain, _inner(self._optimizer))
        self._state = _State(**found.state["run"])
        self._loader.load_state_dict(found.state["stream"])
        if self._accelerator.scaler is not None and found.state.get("scaler"):
            self._accelerator.scaler.load_state_dict(found.state["scaler"])
        self._record.begin(found.step)
        _log.info("resumed at step %d", found.step)

    def _stream(self) -> StreamConfig:
        data, wanted = self._config.data, needs(self._config.loss)
        live = self._transform is not None
        return StreamConfig(
            batch_size=data.batch_size,
            seed=self._config.run.seed if data.seed is None else data.seed,
            shuffle=data.shuffle,
            pool_shards=data.pool_shards,
            sampling=data.sampling,
            targets=wanted.targets and not live,
            packed=self._accelerator.device.type != "cpu",
            draws=wanted.draws and not live,
            hidden=() if live else wanted.hidden,
            extra=() if self._feed is None else self._feed.extra,
            workers=data.workers,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
        )


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [one for one in module.parameters() if one.requires_grad and one.ndim >= 2]
    others = [one for one in module.parameters() if one.requires_grad and one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer  # type: ignore[no-any-return]
