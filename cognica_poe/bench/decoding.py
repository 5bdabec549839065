"""Decoding speed of every mode and drafter, on the same weights and prompts, in one run.

Cases take turns within every prompt and round; a case's time for a prompt is its median over rounds, and ratios carry a
bootstrap interval over prompts. The baseline of all ratios is our own cached greedy decoding, the faster of its padded
form (whose text speculation repeats bit for bit) and its unpadded one.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.modeling import loops_cognica_poe as loops
from cognica_poe.modeling import reference_cognica_poe as reference
from cognica_poe.modeling.engine_cognica_poe import Engines
from cognica_poe.modeling.linears_cognica_poe import LINEARS
from cognica_poe.modeling.request_cognica_poe import GenerationRequest
from cognica_poe.modeling.stages_cognica_poe import StageCache

Log = Callable[[str], None]


@dataclass
class Case:
    """One way to answer a prompt."""

    mode: str
    run: Callable[[torch.Tensor], tuple[torch.Tensor, dict]]
    """From ids ``[B, T]`` to ids ``[B, T + new]`` and what the mode has to tell."""
    drafter: str | None = None
    k_draft: int | None = None
    seconds: list[list[float]] = field(default_factory=list)
    """Per prompt and round."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    facts: list[dict] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Seconds per prompt: medians over rounds."""
        return [statistics.median(rounds) for rounds in self.seconds]


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    new_tokens: int = 128
    rounds: int = 3
    k_drafts: tuple[int, ...] = (4, 7)
    drafters: tuple[str, ...] = ("stage", "int8", "int4", "lookup")
    compiled: bool = False
    width: int | None = None
    synthetic: float | None = None
    """Accept every draft with this probability, whatever it is: for planning with random weights."""


def measure(model: Any, prompts: Sequence[torch.Tensor], settings: Settings, peers: bool, log: Log) -> dict[str, Any]:
    """Rows, peers and the machine's bounds, as the ``bench decode`` command prints them.

    Args:
        model: the causal language model in the dtype and on the device to measure.
        prompts: ids ``[B, T]`` of every prompt.
        settings: what to measure.
        peers: also run transformers' own loop, on this model and on ``NanoChatForCausalLM`` of the same shape, and
            the uncached reference.
        log: receives progress.
    """
    cases, others = ours(model, settings), peer_cases(model, settings, log) if peers else []
    with accepting(settings.synthetic):
        for case in [*cases, *others]:  # kernels are chosen and graphs made before anything is timed
            case.run(prompts[0])
        log(f"{len(cases) + len(others)} ways, warm; {compile_seconds(model):.1f} s of compiling")
        gc.collect()
        gc.freeze()  # the compiler leaves millions of objects: walking them now and then would slow all ways down
        _interleave([*cases, *others], prompts, settings.rounds, log)
    plain = [case for case in cases if case.mode == "full"]
    baseline = min(plain, key=lambda case: sum(case.times))
    bootstrap = Bootstrap(len(prompts)) if len(prompts) > 1 else None
    rows = [_row(model, case, plain[0], baseline, prompts, settings, bootstrap) for case in cases]
    return {
        "baseline": f"{baseline.mode} {_width_of(baseline)}".strip(),
        "rows": rows,
        "peers": [_peer(case, baseline, settings, bootstrap) for case in others],
        "compile_seconds": compile_seconds(model),
        **bounds(model, rows[0]["tokens_per_s"]),
    }


def ours(model: Any, settings: Settings) -> list[Case]:
    """Every mode of the model; the first case is the padded plain decoding, the second the unpadded one."""
    new = {"max_new_tokens": settings.new_tokens, "eos_token_id": []}
    K, narrow = model.config.num_stages, copy.copy(model)  # shares the weights, arranges them for itself
    model.prepare_decoding(settings.compiled, settings.width)
    narrow.prepare_decoding(settings.compiled, 1)
    cases = [
        Case("full", lambda ids: (model.generate_prefix(ids, **new), {})),
        Case("full", lambda ids: (narrow.generate_prefix(ids, **new), {"unpadded": True})),
    ]
    for count in range(1, K):
        cases.append(Case(f"prefix {count}", lambda ids, n=count: (model.generate_prefix(ids, n, **new), {})))
    for stage in range(K):
        cases.append(Case(f"stage {stage}", lambda ids, k=stage: (model.generate_stage(ids, k, **new), {})))
    if model.config.poe_wand_p99_bounds_per_stage_head is not None:
        cases.append(Case("wand", lambda ids: _wand(model, ids, new)))
    drafters = [d for d in settings.drafters if settings.synthetic is None or d != "lookup"]
    for drafter in drafters:
        for k in settings.k_drafts:
            cases.append(Case("speculative", lambda ids, d=drafter, k=k: _speculate(model, ids, d, k, new), drafter, k))
    cases.append(Case("speculative", lambda ids: _speculate(model, ids, "auto", 1, new), "auto"))
    return cases


def _wand(model, ids, new) -> tuple[torch.Tensor, dict]:
    out, used = model.generate_wand(ids, return_stages_used=True, **new)
    return out, {"used": used}


def _speculate(model, ids, drafter: str, k: int, new: dict) -> tuple[torch.Tensor, dict]:
    return model.generate_speculative(ids, 0, k, return_acceptance=True, drafter=drafter, **new)


def peer_cases(model: Any, settings: Settings, log: Log) -> list[Case]:
    """Others on the same weights or shape; the uncached reference answers only a few tokens, it is slow."""
    new = {"max_new_tokens": settings.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cases = [Case("transformers generate, this model", lambda ids: (model.generate(ids, **new), {}))]
    twin = nanochat_twin(model)
    cases.append(
        Case("transformers generate, NanoChatForCausalLM of this shape", lambda ids: (twin.generate(ids, **new), {}))
    )
    few = max(1, settings.new_tokens // 8)

    def uncached(ids):
        request = GenerationRequest.build(model, ids, max_new_tokens=few, eos_token_id=[])
        rows = reference.prefix(model, request, model.config.num_stages)
        return torch.cat((ids, torch.tensor(rows, device=ids.device)), dim=1), {"tokens": few}

    return [*cases, Case("uncached reference", uncached)]


def nanochat_twin(model: Any) -> Any:
    """transformers' own nanochat model with random weights of the same shape, dtype and device."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings")
    config = NanoChatConfig(
        **{name: getattr(c, name) for name in names}, bos_token_id=0, eos_token_id=None, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NanoChatForCausalLM(config).to(model.device, model.dtype).eval()


def _interleave(cases: list[Case], prompts: Sequence[torch.Tensor], rounds: int, log: Log) -> None:
    for case in cases:
        case.seconds = [[] for _ in prompts]
    for number, ids in enumerate(prompts):
        for turn in range(rounds):
            for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
                _synchronize(ids.device)
                began = time.perf_counter()
                out, facts = case.run(ids)
                _synchronize(ids.device)
                case.seconds[number].append(time.perf_counter() - began)
                if turn == 0:
                    case.outputs.append(out)
                    case.facts.append(facts)
        log(f"prompt {number + 1} of {len(prompts)}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def accepting(rate: float | None) -> Iterator[None]:
    """Within it, greedy verification keeps every draft with probability ``rate``; None changes nothing."""
    if rate is None:
        yield
        return
    true, generator = loops.agreeing_drafts, torch.Generator().manual_seed(0)

    def synthetic(best, drafts, counts):
        kept = (torch.rand(drafts.shape, generator=generator).to(drafts.device) < rate).cumprod(dim=1).sum(dim=1)
        return torch.minimum(kept, counts)

    loops.agreeing_drafts = synthetic
    try:
        yield
    finally:
        loops.agreeing_drafts = true


# ---- what the times say -------------------------------------------------------------------------------------------


def _row(model, case: Case, plain: Case, baseline: Case, prompts, settings: Settings, bootstrap) -> dict[str, Any]:
    batch = prompts[0].shape[0]
    tokens = settings.new_tokens * batch * len(prompts)
    total = {key: sum(facts.get(key, 0) for facts in case.facts) for key in ("proposed", "accepted", "rounds")}
    row = {
        "mode": case.mode,
        "drafter": case.drafter,
        "width": 1 if case.facts[0].get("unpadded") else Engines.of(model).get(model).width,
        "batch": batch,
        "k_draft": case.k_draft,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compiled": settings.compiled,
        "tokens_per_s": tokens / sum(case.times),
        "ratio_to_cached_greedy": sum(baseline.times) / sum(case.times),
        "ratio_interval": _interval(bootstrap, baseline.times, case.times),
        "identical_to_greedy": all(torch.equal(a, b) for a, b in zip(case.outputs, plain.outputs, strict=True)),
        "acceptance": total["accepted"] / total["proposed"] if total["proposed"] else None,
        "tokens_per_round": (tokens - batch * len(prompts)) / total["rounds"] if total["rounds"] else None,
        "agreement": None,
    }
    if settings.synthetic is not None and case.mode == "speculative":
        row |= {"synthetic_acceptance": settings.synthetic, "identical_to_greedy": None}
    if case.mode == "wand":
        used = torch.cat([facts["used"].flatten() for facts in case.facts])
        row["stages_used"] = torch.bincount(used, minlength=model.config.num_stages + 1)[1:].tolist()
        row["agreement"] = agreement(model, case.outputs, settings.new_tokens)
    return row


def _peer(case: Case, baseline: Case, settings: Settings, bootstrap) -> dict[str, Any]:
    share = case.facts[0].get("tokens", settings.new_tokens) / settings.new_tokens
    scaled = [seconds / share for seconds in case.times]
    tokens = settings.new_tokens * case.outputs[0].shape[0] * len(case.times)
    return {
        "name": case.mode,
        "tokens_per_s": tokens / sum(scaled),
        "cached_greedy_is_faster_by": sum(scaled) / sum(baseline.times),
        "interval": _interval(bootstrap, scaled, baseline.times),
    }


def _interval(bootstrap: Bootstrap | None, numerator: list[float], denominator: list[float]) -> list[float] | None:
    if bootstrap is None:
        return None
    interval = bootstrap.ratio(numerator, denominator)
    return [interval.low, interval.high]


def _width_of(case: Case) -> str:
    return "unpadded" if case.facts and case.facts[0].get("unpadded") else ""


@torch.no_grad()
def agreement(model: Any, outputs: Sequence[torch.Tensor], new_tokens: int) -> float:
    """Share of the new tokens that the full pool would have chosen behind the same text, in decode steps as well."""
    stages, same = range(model.config.num_stages), []
    engine = Engines.of(model).get(model)
    for ids in outputs:
        B, length = ids.shape
        start = length - new_tokens
        cache = StageCache(engine, list(ids[:, :start]), length)
        cache.advance(0, stages[-1], [True] * B)
        cache.append(ids[:, start:], [new_tokens] * B)
        cache.advance(0, stages[-1], [True] * B)
        pool = cache.pool(stages, [start - 1] * B, new_tokens, None, model.config.poe_alpha)
        same.append((pool.argmax(dim=-1) == ids[:, start:]).flatten())
    return torch.cat(same).double().mean().item()


def compile_seconds(model: Any) -> float:
    """Seconds that compiling took for this model."""
    return model.decoding_seconds_compiled()


@torch.no_grad()
def bounds(model: Any, tokens_per_s: float) -> dict[str, Any]:
    """What a plain step reads, how fast the machine copies, and the share of a step that heads and pool take."""
    engine = Engines.of(model).get(model)
    read = sum(_bytes(module) for module in [*engine.stages, engine.heads])
    copy_rate = copy_bandwidth(model.device)
    cache = StageCache(engine, [torch.zeros(1, dtype=torch.int64, device=model.device)], 1)
    cache.advance(0, model.config.num_stages - 1, [True])
    times = []
    for _ in range(20):
        _synchronize(model.device)
        began = time.perf_counter()
        cache.pool(range(model.config.num_stages), [0], 1, None, model.config.poe_alpha)
        _synchronize(model.device)
        times.append(time.perf_counter() - began)
    return {
        "weight_bytes_per_step": read,
        "copy_bytes_per_s": copy_rate,
        "read_bytes_per_s": read * tokens_per_s,
        "step_over_floor": (1 / tokens_per_s) / (read / copy_rate),
        "heads_share": statistics.median(times) * tokens_per_s,
        "threads": torch.get_num_threads(),
    }


def _bytes(module: torch.nn.Module) -> int:
    """Bytes of the weights that products read; embedding tables are looked up, not read."""
    linears = [part for part in module.modules() if isinstance(part, tuple(LINEARS.values()))]
    return sum(b.numel() * b.element_size() for linear in linears for b in linear.buffers())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of the fastest of ten copies of 256 MiB."""
    source = torch.ones(64 * 2**20, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() * source.element_size() / best
