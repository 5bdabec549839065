"""What each stage head is worth: bits per byte and recalled facts with stage heads switched off or scaled.

The model card's perturbations, in one pass over some held-out text: one stage head off at a time, and all of them
scaled by beta from 0 to 2. Each is done in two gauges (``heads``). *Stored*: the head as it is stored times beta, which
also moves what all heads have in common. *Centred*: what a head has beyond the mean of all heads times beta, which
leaves the common part in place and does not depend on how the optimiser split it from the shared head.

A fact is recalled with the probability of its whole answer behind the prompt; its rank is that of the answer's first
token among all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cognica_poe.analysis.bootstrap import Bootstrap
from cognica_poe.analysis.conditions import evaluation_mode, one_thread
from cognica_poe.analysis.windows import batches, document_windows, lay_out_batch
from cognica_poe.modeling.blocks_cognica_poe import rmsnorm, softcap

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM

BETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
GAUGES = ("stored", "centred")
TOKENS = 16_384
FACTS = (
    ("The capital of France is", " Paris"),
    ("The chemical symbol of gold is", " Au"),
    ("If yesterday was Friday, then tomorrow will be", " Sunday"),
    ("The opposite of hot is", " cold"),
    ("The planets of the solar system are:", " Mercury"),
    ("If 5*x + 3 = 13, then x is", " 2"),
)
"""Prompts of the probes that have one right beginning, and that beginning."""
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Variant:
    """Stage heads times ``beta`` in a gauge: all of them, or the one ``stage``."""

    gauge: str
    stage: int | None
    beta: float


@dataclass(frozen=True)
class HeadPerturbation:
    """Full bits per byte of a variant, and its paired change against the model as it is with a 95 % interval."""

    gauge: str
    stage: int | None
    beta: float
    bpb: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recall:
    """Probability of the whole ``answer`` behind ``prompt``, and rank of its first token (1: the most probable)."""

    prompt: str
    answer: str
    gauge: str
    beta: float
    probability: float
    rank: int


@dataclass(frozen=True)
class Diversity:
    """``tokens`` of held-out text in ``units`` documents (or files) that the perturbations were measured on."""

    tokens: int
    units: int
    perturbations: list[HeadPerturbation]
    recall: list[Recall]


@torch.no_grad()
def measure_diversity(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    units: NDArray[np.int64],
    *,
    betas: Sequence[float] = BETAS,
    tokens: int = TOKENS,
    batch_rows: int = 16,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Diversity | None:
    """One stage head off, and all scaled by each beta; ``None`` for a model without two stage heads or two documents.

    ``texts``: every document is cut to its part of ``tokens``, so that all of them count. ``units`` [texts]: what the
    bootstrap draws. No weight is touched.
    """
    config = model.config
    if config.num_stages < 2 or not config.per_stage_head or config.poe_mode == "none" or len(np.unique(units)) < 2:
        return None
    documents = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(list(texts))]
    kept = [ids[: max(1, tokens * len(ids) // max(tokens, sum(map(len, documents))))] for ids in documents]
    size = np.array([int(tokenizer.token_bytes[ids].sum()) for ids in kept], dtype=np.float64)
    variants = _variants(config.num_stages, betas)
    with evaluation_mode(model):
        heads = _Heads(model)
        nats = _nats(heads, kept, tokenizer.bos_id, variants, batch_rows)
        log(f"stage heads: {len(variants)} variants on {sum(map(len, kept)):,} tokens")
        recall = [found for fact in FACTS for found in _recall(heads, tokenizer, *fact, variants)]
    base = nats[variants.index(Variant("stored", None, 1.0))]
    bits = 1.0 / float(np.log(2))
    changes = Bootstrap(len(texts), units=units, seed=seed).ratios(nats - base, size, bits)
    perturbations = [
        HeadPerturbation(
            variant.gauge, variant.stage, variant.beta,
            bits * float(own.sum() / size.sum()), change.value, change.low, change.high,
        )
        for variant, own, change in zip(variants, nats, changes, strict=True)
    ]  # fmt: skip
    return Diversity(sum(map(len, kept)), len(np.unique(units)), perturbations, recall)


def _variants(stages: int, betas: Sequence[float]) -> list[Variant]:
    """One stage off at a time, then all by every beta, in either gauge; 1 is among the betas."""
    sweep = sorted({*betas, 1.0})
    return [
        Variant(gauge, stage, beta)
        for gauge in GAUGES
        for stage, beta in [*((k, 0.0) for k in range(stages)), *((None, beta) for beta in sweep)]
    ]


class _Heads:
    """The pool's logits under every variant, from boundary states."""

    def __init__(self, model: CognicaPoEForCausalLM) -> None:
        self.model, self.config = model, model.config
        self.stages = range(model.config.num_stages)
        weights = [model.stage_weight(stage) for stage in self.stages]
        self.mean = torch.stack([weight.detach() for weight in weights]).mean(0)
        self.weights = weights

    def states(self, ids: Tensor) -> list[Tensor]:
        """Normed states [B * T, D] behind every stage."""
        _, *states = self.model.boundary_states(ids)[0]
        return [rmsnorm(x, self.config.rms_norm_eps).flatten(0, 1) for x in states]

    def scores(self, states: Sequence[Tensor], variants: Sequence[Variant]) -> Iterator[Tensor]:
        """Unnormalised log-probabilities [n, V] of the pool for states K x [n, D], one per variant."""
        shared = [F.linear(n, self.model.lm_head.weight) for n in states]
        own = [F.linear(n, weight) for n, weight in zip(states, self.weights, strict=True)]
        common = [F.linear(n, self.mean) for n in states]

        def logits(k: int, gauge: str, beta: float) -> Tensor:
            z = shared[k] + (beta * own[k] if gauge == "stored" else common[k] + beta * (own[k] - common[k]))
            return softcap(z, self.config.logit_softcap)

        count = len(self.stages)
        whole = [softcap(shared[k] + own[k], self.config.logit_softcap) for k in self.stages]
        total = torch.stack(whole).sum(0)
        for variant in variants:
            if variant.beta == 1.0:
                pooled = total
            elif variant.stage is None:
                pooled = logits(0, variant.gauge, variant.beta)
                for k in self.stages[1:]:
                    pooled = pooled + logits(k, variant.gauge, variant.beta)
            else:
                k = variant.stage
                pooled = total - whole[k] + logits(k, variant.gauge, variant.beta)
            yield pooled * (count**self.config.poe_alpha / count)


def _nats(
    heads: _Heads, documents: Sequence[NDArray[np.int64]], bos: int, variants: Sequence[Variant], batch_rows: int
) -> NDArray[np.float64]:
    """Nats of every variant by document, [variants, documents]."""
    config, device = heads.config, next(heads.model.parameters()).device
    window = config.max_position_embeddings
    windows = [item for i, ids in enumerate(documents) for item in document_windows(i, len(ids), window, window)]
    found = np.zeros((len(variants), len(documents)))
    step = max(1, _CHUNK_BYTES // (4 * config.vocab_size))
    for rows in batches(windows, batch_rows, 4 * config.num_stages * config.vocab_size):
        batch = lay_out_batch(rows, documents, bos)
        inputs, targets, place = (tensor.to(device) for tensor in (batch.inputs, batch.targets, batch.place))
        states = [n.index_select(0, place) for n in heads.states(inputs)]
        with one_thread():
            for start in range(0, len(targets), step):
                part = slice(start, start + step)
                scores = heads.scores([n[part] for n in states], variants)
                for place_of, score in enumerate(scores):
                    nats = F.cross_entropy(score, targets[part], reduction="none").double().cpu().numpy()
                    np.add.at(found[place_of], batch.document[part], nats)
    return found


def _recall(
    heads: _Heads, tokenizer: Tokenizer, prompt: str, answer: str, variants: Sequence[Variant]
) -> Iterator[Recall]:
    """How each of the variants that scale all heads recalls one fact."""
    before, after = [tokenizer.bos_id, *tokenizer.encode(prompt)], tokenizer.encode(answer)
    if len(before) + len(after) - 1 > heads.config.max_position_embeddings:
        return
    device = next(heads.model.parameters()).device
    ids = torch.tensor([[*before, *after]], device=device)
    states = [n[len(before) - 1 :] for n in heads.states(ids[:, :-1])]
    scaled, targets = [variant for variant in variants if variant.stage is None], ids[0, len(before) :]
    for variant, score in zip(scaled, heads.scores(states, scaled), strict=True):
        chosen = score.log_softmax(dim=-1).gather(1, targets[:, None]).double().sum()
        rank = 1 + int((score[0] > score[0, targets[0]]).sum())
        yield Recall(prompt, answer.strip(), variant.gauge, variant.beta, float(chosen.exp()), rank)
