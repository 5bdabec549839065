"""Decoding speed of every mode and drafter, on the same weights and prompts, in one run.

Contenders take turns within every prompt and round; the time of one for a prompt is its median over rounds, and ratios
carry a bootstrap interval over prompts. The baseline of all ratios is our own cached greedy decoding, the faster of its
padded form (whose text speculation repeats bit for bit) and its unpadded one.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.modeling.drafting_cognica_poe import Drafts
from cognica_poe.modeling.engine_cognica_poe import Engines
from cognica_poe.modeling.linears_cognica_poe import LINEARS
from cognica_poe.modeling.margins_cognica_poe import held_margins
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.modeling.request_cognica_poe import GenerationRequest, Transcript
from cognica_poe.modeling.speculation_cognica_poe import Verifier, decode_speculative, verify
from cognica_poe.modeling.stages_cognica_poe import StageCache

Log = Callable[[str], None]
Answer = Callable[[torch.Tensor], tuple[torch.Tensor, dict]]
"""From ids ``[B, T]`` to ids ``[B, T + new]`` and what the mode has to tell."""


@dataclass
class Contender:
    """One way to answer a prompt."""

    mode: str
    run: Answer
    drafter: str | None = None
    k_draft: int | None = None
    synthetic: float | None = None
    """Probability with which its drafts are accepted, where that is not for the pool to say."""
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
    """What to time."""

    new_tokens: int = 128
    rounds: int = 3
    k_drafts: tuple[int, ...] = (4, 7)
    drafters: tuple[str, ...] = ("stage", "int8", "int4", "lookup")
    compiled: bool = False
    width: int | None = None
    synthetic: float | None = None
    """Accept every draft with this probability, whatever it is: for planning with random weights."""
    synthetic_exit: float | None = None
    """The same for drafts of exits."""
    margins: Mapping[str, Sequence[float]] | None = None
    """Margins to leave early by, by name; those of the model's configuration when None."""


def time_contenders(
    model: CognicaPoEForCausalLM, prompts: Sequence[torch.Tensor], settings: Settings, peers: bool, log: Log
) -> dict[str, Any]:
    """Rows, peers and the machine's bounds, as the ``bench decode`` command prints them.

    Args:
        model: the causal language model in the dtype and on the device to time.
        prompts: ids ``[B, T]`` of every prompt.
        settings: what to time.
        peers: also run transformers' own loop, on this model and on ``NanoChatForCausalLM`` of the same shape, and
            decoding without a cache.
        log: receives progress.
    """
    own = own_contenders(model, settings)
    everyone = own + (peer_contenders(model, settings) if peers else [])
    for contender in everyone:  # kernels are chosen and graphs made before anything is timed
        contender.run(prompts[0])
    log(f"{len(everyone)} ways, warm; {model.decoding_seconds_compiled():.1f} s of compiling")
    gc.collect()
    gc.freeze()  # the compiler leaves millions of objects: walking them now and then would slow all ways down
    _interleave(everyone, prompts, settings.rounds, log)
    plain = [contender for contender in own if contender.mode == "full"]
    baseline = min(plain, key=lambda contender: sum(contender.times))
    bootstrap = Bootstrap(len(prompts)) if len(prompts) > 1 else None
    rows = [_row(model, contender, plain[0], baseline, prompts, settings, bootstrap) for contender in own]
    return {
        "baseline": f"{baseline.mode} {_width_of(baseline)}".strip(),
        "rows": rows,
        "peers": [_peer(contender, baseline, settings, bootstrap) for contender in everyone[len(own) :]],
        "compile_seconds": model.decoding_seconds_compiled(),
        **bounds(model, rows[0]["tokens_per_s"]),
    }


def own_contenders(model: CognicaPoEForCausalLM, settings: Settings) -> list[Contender]:
    """Every mode of the model; the first is the padded plain decoding, the second the unpadded one."""
    new = {"max_new_tokens": settings.new_tokens, "eos_token_id": []}
    K, narrow = model.config.num_stages, copy.copy(model)  # shares the weights, arranges them for itself
    model.prepare_decoding(settings.compiled, settings.width)
    narrow.prepare_decoding(settings.compiled, 1)
    found = [
        Contender("full", _text_of(model.generate_prefix, {}, **new)),
        Contender("full", _text_of(narrow.generate_prefix, {"unpadded": True}, **new)),
    ]
    exits = model.config.poe_exit_layers
    found += [Contender(f"prefix {n}", _text_of(model.generate_prefix, {}, max_stages=n, **new)) for n in range(1, K)]
    found += [Contender(f"stage {k}", _text_of(model.generate_stage, {}, stage=k, **new)) for k in range(K)]
    found += [Contender(f"exit {n}", _text_of(model.generate_exit, {}, layer=n, **new)) for n in exits]
    if model.config.poe_wand_p99_bounds_per_stage_head is not None:
        found.append(Contender("wand", partial(_wand, model, new)))
    for name, margins in (settings.margins or held_margins(model.config)).items():
        found.append(Contender(f"wand {name}", partial(_wand, model, {**new, "margins": margins})))
    drafters = [d for d in settings.drafters if settings.synthetic is None or d != "lookup"]
    places = [("", model.config.stage_segments[0], settings.synthetic)]
    places += [(f" exit {n}", model.config.poe_cuts.index(n), settings.synthetic_exit) for n in exits]
    for name, segment, rate in places:
        verifier = verify if rate is None else accepting(rate)
        for drafter in drafters:
            for k in settings.k_drafts:
                run = _speculative(model, segment, drafter, k, verifier, new)
                found.append(Contender(f"speculative{name}", run, drafter, k, rate))
        run = _speculative(model, segment, "auto", 1, verifier, new)
        found.append(Contender(f"speculative{name}", run, "auto", synthetic=rate))
    return found


def _text_of(method: Callable[..., Any], facts: dict, **options: Any) -> Answer:
    return lambda ids: (method(ids, **options), facts)


def _wand(model: CognicaPoEForCausalLM, options: dict, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
    out, used = model.generate_wand(ids, return_stages_used=True, **options)
    return out, {"used": used}


def _speculative(
    model: CognicaPoEForCausalLM, segment: int, drafter: str, k: int, verifier: Verifier, new: dict
) -> Answer:
    """As ``generate_speculative`` with the head behind ``segment``, and with a rule of acceptance."""

    @torch.no_grad()
    def answer(ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
        request = GenerationRequest.build(model, ids, **new)
        transcript, counts = decode_speculative(model, request, segment, k, drafter, verifier=verifier)
        return transcript.finish(), counts.as_dict()

    return answer


def accepting(rate: float) -> Verifier:
    """A rule that keeps every draft with probability ``rate``, whatever it is."""
    generator = torch.Generator().manual_seed(0)

    def keep_by_chance(transcript: Transcript, pool: torch.Tensor, drafts: Drafts) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = (torch.rand(drafts.tokens.shape, generator=generator) < rate).cumprod(dim=1).sum(dim=1)
        kept = torch.minimum(chosen, torch.tensor(drafts.counts)).to(pool.device)
        return kept, pool.argmax(dim=-1).gather(1, kept[:, None]).squeeze(1)

    return keep_by_chance


def peer_contenders(model: CognicaPoEForCausalLM, settings: Settings) -> list[Contender]:
    """Others on the same weights or shape; without a cache only a few tokens are asked for, it is slow."""
    new = {"max_new_tokens": settings.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    twin, few = nanochat_twin(model), max(1, settings.new_tokens // 8)

    @torch.no_grad()
    def uncached(ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
        for _ in range(few):
            ids = torch.cat((ids, model.forward_aggregated(ids)[:, -1:].argmax(dim=-1)), dim=1)
        return ids, {"tokens": few}

    return [
        Contender("transformers generate, this model", _text_of(model.generate, {}, **new)),
        Contender("transformers generate, NanoChatForCausalLM of this shape", _text_of(twin.generate, {}, **new)),
        Contender("uncached reference", uncached),
    ]


def nanochat_twin(model: CognicaPoEForCausalLM) -> Any:
    """transformers' own nanochat model with random weights of the same shape, dtype and device."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = model.config
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["num_key_value_heads", "head_dim", "max_position_embeddings"]
    config = NanoChatConfig(
        **{name: getattr(c, name) for name in names}, bos_token_id=0, eos_token_id=None, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin: torch.nn.Module = NanoChatForCausalLM(config)
    return twin.to(model.device, model.dtype).eval()


def _interleave(contenders: list[Contender], prompts: Sequence[torch.Tensor], rounds: int, log: Log) -> None:
    for contender in contenders:
        contender.seconds = [[] for _ in prompts]
    for number, ids in enumerate(prompts):
        for turn in range(rounds):
            for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
                _synchronize(ids.device)
                began = time.perf_counter()
                out, facts = contender.run(ids)
                _synchronize(ids.device)
                contender.seconds[number].append(time.perf_counter() - began)
                if turn == 0:
                    contender.outputs.append(out)
                    contender.facts.append(facts)
        log(f"prompt {number + 1} of {len(prompts)}")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- what the times say -------------------------------------------------------------------------------------------


def _row(
    model, contender: Contender, plain: Contender, baseline: Contender, prompts, settings: Settings, bootstrap
) -> dict[str, Any]:
    batch = prompts[0].shape[0]
    tokens = settings.new_tokens * batch * len(prompts)
    total = {key: sum(facts.get(key, 0) for facts in contender.facts) for key in ("proposed", "accepted", "rounds")}
    row = {
        "mode": contender.mode,
        "drafter": contender.drafter,
        "width": 1 if contender.facts[0].get("unpadded") else Engines.of(model).get(model).width,
        "batch": batch,
        "k_draft": contender.k_draft,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compiled": settings.compiled,
        "tokens_per_s": tokens / sum(contender.times),
        "ratio_to_cached_greedy": sum(baseline.times) / sum(contender.times),
        "ratio_interval": _interval(bootstrap, baseline.times, contender.times),
        "identical_to_greedy": all(torch.equal(a, b) for a, b in zip(contender.outputs, plain.outputs, strict=True)),
        "acceptance": total["accepted"] / total["proposed"] if total["proposed"] else None,
        "tokens_per_round": (tokens - batch * len(prompts)) / total["rounds"] if total["rounds"] else None,
        "agreement": None,
    }
    if contender.synthetic is not None:
        row |= {"synthetic_acceptance": contender.synthetic, "identical_to_greedy": None}
    if contender.mode.split()[0] == "wand":
        used = torch.cat([facts["used"].flatten() for facts in contender.facts])
        row["stages_used"] = torch.bincount(used, minlength=model.config.num_stages + 1)[1:].tolist()
        row["agreement"] = agreement(model, contender.outputs, settings.new_tokens)
    return row


def _peer(contender: Contender, baseline: Contender, settings: Settings, bootstrap: Bootstrap | None) -> dict[str, Any]:
    share = contender.facts[0].get("tokens", settings.new_tokens) / settings.new_tokens
    scaled = [seconds / share for seconds in contender.times]
    tokens = settings.new_tokens * contender.outputs[0].shape[0] * len(contender.times)
    return {
        "name": contender.mode,
        "tokens_per_s": tokens / sum(scaled),
        "cached_greedy_is_faster_by": sum(scaled) / sum(baseline.times),
        "interval": _interval(bootstrap, scaled, baseline.times),
    }


def _interval(bootstrap: Bootstrap | None, numerator: list[float], denominator: list[float]) -> list[float] | None:
    if bootstrap is None:
        return None
    interval = bootstrap.ratio(numerator, denominator)
    return [interval.low, interval.high]


def _width_of(contender: Contender) -> str:
    return "unpadded" if contender.facts and contender.facts[0].get("unpadded") else ""


@torch.no_grad()
def agreement(model: CognicaPoEForCausalLM, outputs: Sequence[torch.Tensor], new_tokens: int) -> float:
    """Share of the new tokens that the full pool would have chosen behind the same text, in decode steps as well."""
    heads, same = model.config.stage_segments, []
    engine = Engines.of(model).get(model)
    for ids in outputs:
        B, length = ids.shape
        start = length - new_tokens
        cache = StageCache(engine, list(ids[:, :start]), length)
        cache.advance(0, heads[-1], [True] * B)
        cache.append(ids[:, start:], [new_tokens] * B)
        cache.advance(0, heads[-1], [True] * B)
        pool = cache.pool(heads, [start - 1] * B, new_tokens, None, model.config.poe_alpha)
        same.append((pool.argmax(dim=-1) == ids[:, start:]).flatten())
    return torch.cat(same).double().mean().item()


@torch.no_grad()
def bounds(model: CognicaPoEForCausalLM, tokens_per_s: float) -> dict[str, Any]:
    """What a plain step reads, how fast the machine copies, and the share of a step that heads and pool take."""
    engine = Engines.of(model).get(model)
    heads = model.config.stage_segments
    read = sum(_bytes(module) for module in [*engine.segments, *(engine.folded[head] for head in heads)])
    copy_rate = copy_bandwidth(model.device)
    cache = StageCache(engine, [torch.zeros(1, dtype=torch.int64, device=model.device)], 1)
    cache.advance(0, heads[-1], [True])
    times = []
    for _ in range(20):
        _synchronize(model.device)
        began = time.perf_counter()
        cache.pool(heads, [0], 1, None, model.config.poe_alpha)
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
    packed = [p for linear in linears if (p := getattr(linear, "packed", None)) is not None]
    dense = [b for linear in linears if getattr(linear, "packed", None) is None for b in linear.buffers()]
    return sum(b.numel() * b.element_size() for b in (*packed, *dense))


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
