"""What is measured of a trained arm: nats per document and path, acceptance, agreement, memory, work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gap.arms import TOKENS_PER_STEP, Job, steps_of
from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.speculative import choose_prompts, measure_acceptance
from cognica_poe.bench.memory import peak_bytes
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.planning.costs import Costs
from cognica_poe.recipe.fields import Recipe
from cognica_poe.training.build import build_model
from cognica_poe.training.objective import Objective

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, DRAFT_LENGTH = 64, 32, 64, 4
OPENING = 3000
"""Characters of a validation document that count: many documents decide, no long one."""


def evaluate(
    job: Job, recipe: Recipe, model: CognicaPoEForCausalLM, run: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """The result of a job, as JSON. Nats are per validation document, drafts per prompt."""
    tokenizer = load_tokenizer(run / "tokenizer")
    texts = [document.text[:OPENING] for document in read_documents(run / "data", "val")]
    model.eval()
    measured = measure_paths(model, tokenizer, texts, log=log)
    sums, agrees = measured.sums, measured.positions.agrees
    prompts = choose_prompts(tokenizer, texts, count=PROMPTS, tokens=PROMPT_TOKENS)
    room = recipe.model.max_position_embeddings - PROMPT_TOKENS
    options = {"new_tokens": min(NEW_TOKENS, room), "k_draft": DRAFT_LENGTH}
    drafted = [measure_acceptance(model, [prompt], **options) for prompt in prompts]
    log(f"drafted for {len(prompts)} prompts")
    steps = steps_of(job.tokens)
    costs = Costs(recipe)
    return {
        "job": job.name,
        "arm": job.arm,
        "tokens": steps * TOKENS_PER_STEP,
        "seed": job.seed,
        "rate": job.rate,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": [int(value) for value in sums.bytes],
        "targets": [int(value) for value in sums.targets],
        "nats": {name: [round(float(v), 4) for v in values] for name, values in sums.nats.items()},
        "agreement": float(agrees[0].mean()) if len(agrees) else None,
        "agreement_positions": int(agrees.shape[-1]),
        "proposed": [prompt.proposed for prompt in drafted],
        "accepted": [prompt.accepted for prompt in drafted],
        "peak_bytes": peak_activations(recipe),
        "operations": costs.flops_per_token() * steps * TOKENS_PER_STEP,
    }


def peak_activations(recipe: Recipe) -> int:
    """Most bytes that activations and scratch of one micro-batch held at once, gradients not counted."""
    training = recipe.training
    model = build_model(recipe.model, training.seed).train()
    objective = Objective(model, getattr(torch, training.compute_dtype), training.recompute, training.objective)
    objective.begin(1.0)  # the phase that keeps most
    generator = torch.Generator().manual_seed(0)
    shape = (training.micro_rows, recipe.model.max_position_embeddings + 1)
    ids = torch.randint(recipe.model.vocab_size, shape, generator=generator)
    objective.backward(ids[:, :-1], ids[:, 1:])
    return peak_bytes(lambda: objective.backward(ids[:, :-1], ids[:, 1:]))
