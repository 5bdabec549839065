"""One checkpoint, all its measurements: the model in memory becomes an analysis record."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cognica_poe.analysis.agreement import exit_rules
from cognica_poe.analysis.bits_per_byte import DocumentSums, Measurement, measure_paths
from cognica_poe.analysis.bootstrap import Bootstrap, Interval
from cognica_poe.analysis.conditions import one_thread
from cognica_poe.analysis.diversity import measure_diversity
from cognica_poe.analysis.drafts import DRAFTS, drafts_behind, measure_drafts
from cognica_poe.analysis.heads import head_geometry
from cognica_poe.analysis.probes import PROBES, TOKENS, run_probes
from cognica_poe.analysis.record import AnalysisRecord
from cognica_poe.analysis.routing import route, routing_curve, stage0_cost
from cognica_poe.analysis.speculative import SpeculativeResult, choose_prompts, measure_acceptance
from cognica_poe.analysis.sums import Sums, count_positions
from cognica_poe.analysis.validation import ValidationSlice, document_slice
from cognica_poe.analysis.wand import CALIBRATION_TOKENS, cross_fit
from cognica_poe.data.manifest import read_documents

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

_BITS = 1.0 / np.log(2)


def weights_sha256(model: torch.nn.Module) -> str:
    """sha256 over the names and bytes of the state dict's tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(name.encode() + b"\0" + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def analyze(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    data_dir: Path,
    *,
    step: int,
    tokens_seen: int,
    name: str,
    val_max_bytes: int | None = None,
    batch_rows: int = 16,
    baseline: Mapping[str, Any] | None = None,
    seed: int = 0,
    safety: float = 1.0,
    prompts: int = 16,
    new_tokens: int = 32,
    k_draft: int = 4,
    drafts: int = DRAFTS,
    probe_tokens: int = TOKENS,
    heads: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> AnalysisRecord:
    """Measure ``model`` on the validation split of ``data_dir``.

    Args:
        model: its training flag is restored.
        tokenizer: as in ``measure_paths``.
        step, tokens_seen, name: of the checkpoint, stored as given.
        val_max_bytes: measure on a sample of this many bytes (see ``document_slice``); ``None`` takes all.
        batch_rows: most windows per forward pass.
        baseline: what ``xz_baseline`` returned for the texts of the same ``document_slice``, or ``None``.
        seed: of the bootstrap.
        safety: of WAND.
        prompts, new_tokens, k_draft: for speculative acceptance; stage 0 drafts.
        drafts: of length 1 that acceptance by draft length is measured with; 0 leaves it out.
        probe_tokens: length of the probe continuations.
        heads: also measure what each stage head is worth (``diversity``).
        log: receives progress lines.

    Raises:
        UserError: no validation data.
        ValueError: non-finite losses (the model diverged), a tokenizer that loses bytes.
    """
    started = time.perf_counter()
    part = document_slice(read_documents(Path(data_dir), "val"), val_max_bytes)
    log(f"step {step}: measuring on {len(part.texts)} {part.unit}s, {part.bytes:,} bytes")
    if baseline and baseline.get("val_bytes", part.bytes) != part.bytes:
        log(f"the baseline stands for {baseline['val_bytes']:,} bytes, the model's numbers for {part.bytes:,}")
    result = measure_paths(model, tokenizer, part.texts, batch_rows=batch_rows, positions=CALIBRATION_TOKENS, log=log)
    if not all(np.isfinite(nats).all() for nats in result.sums.nats.values()):
        raise ValueError(f"step {step} has non-finite losses: its weights diverged")
    bootstrap = Bootstrap(len(part.texts), units=part.units, seed=seed)
    wand = asdict(cross_fit(result.positions, safety=safety))
    chosen = choose_prompts(tokenizer, part.texts, count=prompts, tokens=32)
    with one_thread():
        speculative = measure_acceptance(model, chosen, new_tokens=new_tokens, k_draft=k_draft, seed=seed, log=log)
        curve = _drafts(model, tokenizer, part, drafts, k_draft, seed, log)
        probes = run_probes(model, tokenizer, new_tokens=probe_tokens, log=log)
    config = model.config
    fields = {
        "step": step,
        "tokens_seen": tokens_seen,
        "model": _model_facts(model, name),
        "path": "plain" if config.poe_mode == "none" else "pool",
        **path_fields(result.sums, bootstrap),
        "wand_bounds": wand.pop("bounds"),
        "wand": wand,
        "exit_rules": [asdict(rule) for rule in exit_rules(result.positions, part.units[result.positions.document])],
        "speculative": _counted(speculative),
        "drafts": curve,
        "routing": _routing(result, part, stage0_cost(config), seed) if result.sums.stages > 1 else None,
        "heads": _heads(model, tokenizer, part, heads, batch_rows, seed, log),
        "baseline": dict(baseline) if baseline is not None else None,
        "validation": _validation(part, result),
        "probes": [asdict(probe) for probe in probes],
        "versions": _versions(),
    }
    record = AnalysisRecord.model_validate(fields)
    by_prompt = np.array(speculative.by_prompt, dtype=np.int64).T if speculative.by_prompt else None
    together = part.units if part.owners else None
    record._sums = Sums(result.sums, count_positions(result.positions), by_prompt, together)
    spent = time.perf_counter() - started
    log(f"step {step}: {record.bpb.full:.4f} bits per byte ({record.path} path) in {spent:.1f} s")
    return record


def _model_facts(model: CognicaPoEForCausalLM, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "poe_mode": model.config.poe_mode,
        "stage_layers": list(model.config.poe_stage_layers),
        "weights_sha256": weights_sha256(model),
    }


def path_fields(sums: DocumentSums, bootstrap: Bootstrap) -> dict[str, Any]:
    """The record's ``bpb``, ``accuracy``, ``gaps``, ``intervals`` and ``accuracy_intervals``.

    ``bootstrap``: over the documents of ``sums``.
    """
    stages = [f"stage{k}" for k in range(sums.stages)]
    prefixes = [f"prefix{k}" for k in range(sums.stages)]
    paths = ["full", *stages, *prefixes, "plain"]
    bits = _by_path(paths, bootstrap.ratios([sums.nats[path] for path in paths], sums.bytes, _BITS))
    right = _by_path(paths, bootstrap.ratios([sums.correct[path] for path in paths], sums.targets))
    others = [sums.nats[path] for path in (*stages, *prefixes[:-1])]
    gaps = [asdict(gap) for gap in bootstrap.differences(sums.nats["full"], others, sums.bytes, _BITS)]
    bpb = {path: interval.value for path, interval in bits.items()}
    accuracy = {path: interval.value for path, interval in right.items()}
    stage_bpb = [bpb[path] for path in stages]

    def intervals(values: dict[str, Interval]) -> dict[str, Any]:
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
            "prefix": [accuracy[path] for path in prefixes],
            "plain": accuracy["plain"],
        },
        "gaps": {"stage": gaps[: len(stages)], "prefix": gaps[len(stages) :]},
        "intervals": intervals(bits),
        "accuracy_intervals": intervals(right),
    }


def _by_path(paths: list[str], intervals: list[Interval]) -> dict[str, Interval]:
    return dict(zip(paths, intervals, strict=True))


def _validation(part: ValidationSlice, result: Measurement) -> dict[str, Any]:
    return {
        "documents": len(part.texts),
        "bytes": int(result.sums.bytes.sum()),
        "tokens": result.tokens,
        "sha256": part.sha256,
        "window": result.window,
        "stride": result.stride,
        "unit": part.unit,
        "files": len(set(part.owners)) or None,
        "sampled": part.sampled,
    }


def _routing(result: Measurement, part: ValidationSlice, cost: float, seed: int) -> dict[str, Any]:
    curve = routing_curve(result.positions, part.units[result.positions.document], seed=seed)
    return {**asdict(route(result.positions, cost)), "curve": [asdict(point) for point in curve]}


def _counted(found: SpeculativeResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key != "by_prompt"}


def _drafts(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    part: ValidationSlice,
    drafts: int,
    k_draft: int,
    seed: int,
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    """Acceptance by draft length, and behind the probe prompts."""
    curve = (
        measure_drafts(model, tokenizer, part.texts, part.units, drafts=drafts, seed=seed, log=log) if drafts else None
    )
    if curve is None:
        return None
    prompts = [[tokenizer.bos_id, *tokenizer.encode(probe.prompt)] for probe in PROBES]
    probes = drafts_behind(model, prompts, k_draft=k_draft, seed=seed)
    return {**asdict(curve), "probes": probes and _counted(probes)}


def _heads(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    part: ValidationSlice,
    perturbed: bool,
    batch_rows: int,
    seed: int,
    log: Callable[[str], None],
) -> dict[str, Any] | None:
    geometry = head_geometry(model, tokenizer)
    if geometry is None:
        return None
    options: dict[str, Any] = {"batch_rows": batch_rows, "seed": seed, "log": log}
    found = measure_diversity(model, tokenizer, part.texts, part.units, **options) if perturbed else None
    return {**asdict(geometry), **(asdict(found) if found else {})}


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
