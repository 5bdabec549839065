"""One checkpoint, all its figures: the model in memory becomes an analysis record.

The validation documents are chosen by ``validation_slice``, which every figure of a run uses (the xz baseline
included), so that figures of different checkpoints and methods stand for the same bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cognica_poe.analysis.bits_per_byte import DocumentSums, Evaluation, evaluate
from cognica_poe.analysis.bootstrap import Bootstrap, Interval
from cognica_poe.analysis.heads import head_geometry, perturb_heads
from cognica_poe.analysis.probes import run_probes
from cognica_poe.analysis.record import AnalysisRecord
from cognica_poe.analysis.routing import route, stage0_cost
from cognica_poe.analysis.speculative import choose_prompts, measure_acceptance
from cognica_poe.analysis.threads import one_thread
from cognica_poe.analysis.wand import CALIBRATION_TOKENS, cross_fit
from cognica_poe.errors import UserError

_FEWEST_UNITS = 8
_BITS = 1.0 / np.log(2)


@dataclass(frozen=True)
class ValidationSlice:
    """The texts that a run is measured on. ``unit`` is "piece" where documents had to be cut for the bootstrap."""

    texts: list[str]
    sha256: str
    bytes: int
    unit: str
    sampled: bool


def validation_slice(texts: Iterable[str], max_bytes: int | None = None) -> ValidationSlice:
    """Choose what to measure on; the same texts and limit give the same slice.

    All documents, if they fit in ``max_bytes``. Otherwise documents in the order of their sha256 (a sample of all
    sources, whatever their order), each cut to 1/32 of the limit (at least 2 KiB) so that no document dominates. A
    slice of fewer than 8 documents is cut at line ends into pieces of about a sixteenth, for the sake of intervals.

    Raises:
        UserError: no document.
    """
    chosen, sampled = _choose(texts, max_bytes)
    if not chosen:
        raise UserError("the validation split holds no document: build the data with a larger validation share")
    unit = "document"
    if len(chosen) < _FEWEST_UNITS:
        size = max(1, sum(map(len, chosen)) // (2 * _FEWEST_UNITS))
        pieces = [piece for text in chosen for piece in _pieces(text, size)]
        if len(pieces) > len(chosen):
            chosen, unit = pieces, "piece"
    if len(chosen) < 2:
        raise UserError("the validation split holds a single short document: build the data with more validation text")
    digest = hashlib.sha256()
    total = 0
    for text in chosen:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        total += len(data)
    return ValidationSlice(chosen, digest.hexdigest(), total, unit, sampled)


def _choose(texts: Iterable[str], max_bytes: int | None) -> tuple[list[str], bool]:
    """Texts in their own order if all fit in ``max_bytes``, else a sample in hash order, and whether it is a sample."""
    everything: list[str] = []
    sample: list[tuple[int, int, bytes]] = []  # heap of (-hash, index, text cut): the largest hash on top
    cap = max(2048, (max_bytes or 0) // 32)
    total = kept = 0
    for index, text in enumerate(text for text in texts if text):
        data = text.encode()
        total += len(data)
        if max_bytes is None:
            everything.append(text)
            continue
        if total <= max_bytes:
            everything.append(text)
        else:
            everything.clear()
        key = int.from_bytes(hashlib.sha256(data).digest())
        heapq.heappush(sample, (-key, index, data[:cap]))
        kept += min(len(data), cap)
        while kept - len(sample[0][2]) >= max_bytes:  # enough without the largest hash
            kept -= len(heapq.heappop(sample)[2])
    if max_bytes is None or total <= max_bytes:
        return everything, False
    chosen, left = [], max_bytes
    for _, _, data in sorted(sample, reverse=True):
        text = data[:left].decode(errors="ignore")  # a cut may fall inside a character
        left -= min(len(data), left)
        if text:
            chosen.append(text)
    return chosen, True


def _pieces(text: str, size: int) -> list[str]:
    """Consecutive pieces of at least ``size`` characters, cut at line ends, or anywhere in lines beyond twice that."""
    pieces, current = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), 2 * size):
            current += line[start : start + 2 * size]
            if len(current) >= size:
                pieces.append(current)
                current = ""
    return [*pieces, current] if current else pieces


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over the names and bytes of the state dict's tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(name.encode() + b"\0" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def analyze(
    model: torch.nn.Module,
    tokenizer,
    data_dir: Path,
    *,
    step: int,
    tokens_seen: int,
    name: str,
    val_max_bytes: int | None = None,
    batch_rows: int = 16,
    previous: AnalysisRecord | None = None,
    baseline: Mapping[str, Any] | None = None,
    seed: int = 0,
    safety: float = 1.0,
    prompts: int = 16,
    new_tokens: int = 32,
    draft_length: int = 4,
    probe_tokens: int = 48,
    head_documents: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> AnalysisRecord:
    """Measure ``model`` on the validation split of ``data_dir``.

    Args:
        model: a CognicaPoEForCausalLM; its training flag is restored.
        tokenizer: as in ``evaluate``.
        step, tokens_seen, name: of the checkpoint, stored as given.
        val_max_bytes: measure on a sample of this many bytes (see ``validation_slice``); ``None`` takes all.
        batch_rows: most windows per forward pass.
        previous: an earlier record with its document sums; gives ``delta`` if it was measured on the same slice.
        baseline: what ``xz_baseline`` returned for the texts of the same ``validation_slice``, or ``None``.
        seed: of the bootstrap.
        safety: of WAND.
        prompts, new_tokens, draft_length: for speculative acceptance; stage 0 drafts.
        probe_tokens: length of the probe continuations.
        head_documents: measure the perturbations of the stage heads on this many documents (0: not at all); each
            takes ``K + 4`` passes.
        log: receives progress lines.

    Raises:
        UserError: no validation data.
        ValueError: non-finite figures (the model diverged), a tokenizer that loses bytes.
    """
    from cognica_poe.data.manifest import read_documents

    started = time.perf_counter()
    part = validation_slice((document.text for document in read_documents(Path(data_dir), "val")), val_max_bytes)
    log(f"step {step}: measuring on {len(part.texts)} {part.unit}s, {part.bytes:,} bytes")
    if baseline and baseline.get("val_bytes", part.bytes) != part.bytes:
        log(f"the baseline stands for {baseline['val_bytes']:,} bytes, the model's figures for {part.bytes:,}")
    result = evaluate(model, tokenizer, part.texts, batch_rows=batch_rows, positions=CALIBRATION_TOKENS, log=log)
    if not all(np.isfinite(nats).all() for nats in result.sums.nats.values()):
        raise ValueError(f"step {step} has non-finite losses: its weights diverged")
    bootstrap = Bootstrap(len(part.texts), seed=seed)
    wand = asdict(cross_fit(result.positions, safety=safety))
    chosen = choose_prompts(tokenizer, part.texts, count=prompts, tokens=32)
    with one_thread():
        speculative = measure_acceptance(
            model, chosen, new_tokens=new_tokens, draft_length=draft_length, seed=seed, log=log
        )
        probes = run_probes(model, tokenizer, new_tokens=probe_tokens, log=log)
    config = model.config
    fields = {
        "step": step,
        "tokens_seen": tokens_seen,
        "model": {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "poe_mode": config.poe_mode,
            "stage_layers": list(config.poe_stage_layers),
            "weights_sha256": weights_sha256(model),
        },
        "path": "plain" if config.poe_mode == "none" else "pool",
        **path_figures(result.sums, bootstrap),
        "wand_bounds": wand.pop("bounds"),
        "wand": wand,
        "speculative": asdict(speculative),
        "routing": asdict(route(result.positions, stage0_cost(config))) if result.sums.stages > 1 else None,
        "heads": _heads(model, tokenizer, part, head_documents, batch_rows, seed, log),
        "baseline": dict(baseline) if baseline is not None else None,
        "validation": _validation(part, result),
        "probes": [asdict(probe) for probe in probes],
        "delta": _delta(result.sums, part, previous, bootstrap, log),
        "seconds": time.perf_counter() - started,
        "versions": _versions(),
    }
    record = AnalysisRecord.model_validate(fields)
    record._documents = result.sums
    log(f"step {step}: {record.bpb.full:.4f} bits per byte ({record.path} path) in {record.seconds:.1f} s")
    return record


def path_figures(sums: DocumentSums, bootstrap: Bootstrap) -> dict:
    """The record's ``bpb``, ``accuracy``, ``crossover_gap``, ``intervals`` and ``accuracy_intervals``."""
    stages = [f"stage{k}" for k in range(sums.stages)]
    prefixes = [f"prefix{k}" for k in range(sums.stages)]
    paths = ["full", *stages, *prefixes, "plain"]
    bits = _by_path(paths, bootstrap.ratios([sums.nats[path] for path in paths], sums.bytes, _BITS))
    right = _by_path(paths, bootstrap.ratios([sums.correct[path] for path in paths], sums.targets))
    gap = bootstrap.difference(sums.nats["full"], sums.bytes, sums.nats[stages[-1]], sums.bytes, _BITS)
    bpb = {path: interval.value for path, interval in bits.items()}
    accuracy = {path: interval.value for path, interval in right.items()}
    stage_bpb = [bpb[path] for path in stages]

    def intervals(values: dict[str, Interval]) -> dict:
        return {
            "full": values["full"].bounds(),
            "stage": [values[path].bounds() for path in stages],
            "prefix": [values[path].bounds() for path in prefixes],
            "plain": values["plain"].bounds(),
        }

    return {
        "bpb": {
            "full": bpb["full"],
            "stage": stage_bpb,
            "prefix": [bpb[path] for path in prefixes],
            "plain": bpb["plain"],
            "mean_stage": float(np.mean(stage_bpb)),
        },
        "accuracy": {
            "full": accuracy["full"],
            "stage": [accuracy[path] for path in stages],
            "plain": accuracy["plain"],
        },
        "crossover_gap": {"value": bpb["full"] - stage_bpb[-1], "low": gap.low, "high": gap.high},
        "intervals": intervals(bits),
        "accuracy_intervals": intervals(right),
    }


def _by_path(paths: list[str], intervals: list[Interval]) -> dict[str, Interval]:
    return dict(zip(paths, intervals, strict=True))


def _validation(part: ValidationSlice, result: Evaluation) -> dict:
    return {
        "documents": len(part.texts),
        "bytes": int(result.sums.bytes.sum()),
        "tokens": result.tokens,
        "sha256": part.sha256,
        "window": result.window,
        "stride": result.stride,
        "unit": part.unit,
        "sampled": part.sampled,
    }


def _heads(model, tokenizer, part: ValidationSlice, documents: int, batch_rows: int, seed: int, log) -> dict | None:
    geometry = head_geometry(model, tokenizer)
    if geometry is None:
        return None
    changes = None
    if documents:
        texts = part.texts[: max(2, documents)]
        changes = perturb_heads(model, tokenizer, texts, batch_rows=batch_rows, seed=seed, log=log)
    return {**asdict(geometry), "perturbations": changes and [asdict(change) for change in changes]}


def _delta(
    sums: DocumentSums,
    part: ValidationSlice,
    previous: AnalysisRecord | None,
    bootstrap: Bootstrap,
    log: Callable[[str], None],
) -> dict | None:
    """Paired change of the full BPB since ``previous``; ``None`` (said in the log) if the two cannot be paired."""
    if previous is None:
        return None
    if previous.validation.sha256 != part.sha256 or previous.documents is None:
        reason = "has no document sums" if previous.documents is None else "was measured on another slice"
        log(f"no delta: the record of step {previous.step} {reason}")
        return None
    before = previous.documents
    change = bootstrap.difference(sums.nats["full"], sums.bytes, before.nats["full"], before.bytes, _BITS)
    return {
        "previous_step": previous.step,
        "full": change.value,
        "low": change.low,
        "high": change.high,
        "signal": change.signal,
    }


def _versions() -> dict[str, str]:
    import transformers

    from cognica_poe import __version__

    return {
        "cognica_poe": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
