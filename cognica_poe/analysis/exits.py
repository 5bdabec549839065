"""What an exit inside a stage is worth: its loss, how often it chooses what the full pool chooses, its WAND bound.

One pass over held-out text at teacher-forced positions. The bound is the 99th percentile, over positions, of
``range(c_k - e)`` with e the exit's log-probabilities and c_k the pool of the stages up to the end of its own, as those
between pools (``analysis.wand``): a token may leave at the exit when its margin exceeds this bound and those behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from cognica_poe.analysis.conditions import evaluation_mode
from cognica_poe.analysis.wand import QUANTILE
from cognica_poe.analysis.windows import batches, document_windows, lay_out_batch
from cognica_poe.modeling.sampling_cognica_poe import combine

if TYPE_CHECKING:
    from cognica_poe.data.tokenizer import Tokenizer
    from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM


@dataclass(frozen=True)
class ExitMeasure:
    """An exit at ``positions`` teacher-forced positions of held-out text."""

    layer: int
    """Layers before it."""
    nats: float
    """Mean cross-entropy."""
    pool_nats: float
    """That of the full pool at the same positions."""
    agreement: float
    """Share of the positions where its most probable token is that of the full pool."""
    bound: float
    """WAND p99 bound in nats."""
    positions: int


@torch.no_grad()
def measure_exits(
    model: CognicaPoEForCausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    tokens: int = 131_072,
    batch_rows: int = 16,
    log: Callable[[str], None] = lambda line: None,
) -> list[ExitMeasure]:
    """All exits of ``model`` on the first documents of ``texts``, about ``tokens`` tokens of them. They hold some."""
    config, device = model.config, next(model.parameters()).device
    documents = [ids.astype(np.int64) for ids in tokenizer.encode_batch(list(texts))]
    kept = max(1, int(np.searchsorted(np.cumsum([len(ids) for ids in documents]), tokens, side="right")))
    length, heads = config.max_position_embeddings, config.num_stages + 2
    windows = [item for i, ids in enumerate(documents[:kept]) for item in document_windows(i, len(ids), length, length)]
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in config.poe_exit_layers}
    with evaluation_mode(model):
        for rows in batches(windows, batch_rows, 4 * heads * config.vocab_size):
            batch = lay_out_batch(rows, documents, tokenizer.bos_id)
            inputs, targets, place = (t.to(device) for t in (batch.inputs, batch.targets, batch.place))
            stages = [z.flatten(0, 1).index_select(0, place) for z in model.all_logits(inputs)[0]]
            pools = [combine(stages[: k + 1], config.poe_alpha) for k in range(config.num_stages)]
            best, pool_nats = pools[-1].argmax(dim=-1), F.nll_loss(pools[-1], targets, reduction="none")
            for stage in range(config.num_stages):
                for layer in (config.poe_exit_layers[exit] for exit in config.exits_of(stage)):
                    scores = model.forward_exit(inputs, layer).flatten(0, 1).index_select(0, place).log_softmax(dim=-1)
                    change = pools[stage] - scores
                    columns = (
                        F.nll_loss(scores, targets, reduction="none"),
                        pool_nats,
                        scores.argmax(dim=-1) == best,
                        change.amax(dim=-1) - change.amin(dim=-1),
                    )
                    found[layer].append(torch.stack([column.double() for column in columns]).cpu())
    measures = []
    for layer, parts in found.items():
        nats, of_pool, agrees, ranges = torch.cat(parts, dim=1).numpy()
        bound = float(np.quantile(ranges, QUANTILE))
        measure = ExitMeasure(layer, nats.mean(), of_pool.mean(), agrees.mean(), bound, len(nats))
        log(f"exit {layer}: agrees with the pool at {measure.agreement:.1%} of {measure.positions:,} positions")
        measures.append(measure)
    return measures
