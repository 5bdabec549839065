"""Product-of-Experts causal language model: nanochat's GPT cut into stages with one prediction head each.

Shapes: ``B`` batch, ``T`` time, ``D`` width, ``V`` vocab, ``K`` stages, ``N`` query heads, ``G`` key/value heads,
``h`` head dim. The file knows nothing of training loops or parallelism; trainers drive ``embed``, ``run_layers`` and
``head_weight``, users call ``forward``, ``forward_stage``, ``forward_aggregated`` and the generation methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .blocks_cognica_poe import Block, Rotary, Trunk, rmsnorm, rotary_factors, smear
from .cache_cognica_poe import CognicaKVCache
from .configuration_cognica_poe import CognicaPoEConfig, check
from .decoding_cognica_poe import PoEDecodingMixin
from .documents_cognica_poe import document_places, is_followed
from .engine_cognica_poe import ENGINES
from .finetuning_cognica_poe import PoEFinetuningMixin
from .heads_cognica_poe import Head, LowRankHead, PoEHeadsMixin, factor, make_heads
from .sampling_cognica_poe import combine


class CognicaPoEForCausalLM(PoEFinetuningMixin, PreTrainedModel, PoEHeadsMixin, PoEDecodingMixin, GenerationMixin):
    """The model with its K heads. ``generate()`` samples the pool; the other modes are in ``PoEDecodingMixin``."""

    config: CognicaPoEConfig
    config_class = CognicaPoEConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012 - the type that transformers declares
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: CognicaPoEConfig):
        super().__init__(config)
        self.gradient_checkpointing = False  # transformers sets it
        width, vocab, layers = config.hidden_size, config.vocab_size, config.num_hidden_layers
        kv_width = config.num_key_value_heads * config.head_dim
        self.transformer = Trunk(config)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocab, kv_width) for i in range(layers) if config.has_value_embedding(i)}
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        stages = config.num_stages if config.per_stage_head else 0
        self.lm_head_stages = make_heads(config, stages, config.stage_head_rank)
        self.resid_lambdas = nn.Parameter(torch.empty(layers))
        self.x0_lambdas = nn.Parameter(torch.empty(layers))
        self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        self.backout_lambda = nn.Parameter(torch.empty(1))
        with torch.random.fork_rng(devices=[]):  # everything else begins as it does without exits
            self.lm_head_exits = make_heads(config, len(config.poe_exit_layers), config.exit_head_rank)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """nanochat's initialisation: every parameter set explicitly, smear and backout included."""
        # All from the model itself: transformers skips submodules of custom code that own no parameter directly.
        if module is not self:
            return
        config, bound = self.config, math.sqrt(3.0 / self.config.hidden_size)
        init.normal_(self.transformer.wte.weight, mean=0.0, std=0.8)
        init.normal_(self.lm_head.weight, mean=0.0, std=0.001)
        for head in (*self.lm_head_stages, *self.lm_head_exits):
            init.zeros_(factor(cast(Head, head)))
        for embedding in self.value_embeds.parameters():
            init.uniform_(embedding, -bound, bound)
        lambdas = (self.resid_lambdas, config.resid_lambda_init), (self.x0_lambdas, config.x0_lambda_init)
        for parameter, (first, last) in lambdas:
            init.copy_(parameter, torch.linspace(first, last, config.num_hidden_layers))
        init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        init.zeros_(self.smear_lambda)
        init.constant_(self.backout_lambda, 0.2)
        for block in self.transformer.h:
            assert isinstance(block, Block)
            attention, mlp = block.attn, block.mlp
            for matrix in (attention.c_q, attention.c_k, attention.c_v):
                init.uniform_(matrix.weight, -bound, bound)
            init.zeros_(attention.c_proj.weight)
            if hasattr(attention, "ve_gate"):
                init.uniform_(attention.ve_gate.weight, 0.0, 0.02)
            init.uniform_(mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            init.zeros_(mlp.c_proj.weight)
        for head in (*self.lm_head_stages, *self.lm_head_exits):  # last: the trunk is the same for every kind of heads
            if isinstance(head, LowRankHead):
                init.uniform_(head.down.weight, -bound, bound)

    def __getstate__(self) -> dict:
        """What a copy or a pickle gets: all but the weights arranged for decoding, which are this object's alone."""
        return {name: value for name, value in super().__getstate__().items() if name != ENGINES}

    def get_input_embeddings(self) -> nn.Embedding:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = cast(nn.Embedding, value)

    def embed(self, ids: torch.Tensor, real: torch.Tensor | None = None, previous=None) -> torch.Tensor:
        """Normed and smeared token embeddings ``x0`` ``[B, T, D]``.

        Args:
            ids: token ids ``[B, T]``.
            real: bool ``[B, T]``, False at padding, which is nobody's predecessor; None when all are real.
            previous: id and realness ``[B, 1]`` of the token before the block; None at the start of the text.
        """
        eps = self.config.rms_norm_eps
        x = rmsnorm(self.transformer.wte(ids), eps)
        before = torch.zeros_like(x[:, :1])
        if previous is not None:
            before = rmsnorm(self.transformer.wte(previous[0]), eps) * previous[1].unsqueeze(-1).to(x.dtype)
        earlier = x[:, :-1] if real is None else x[:, :-1] * real[:, :-1].unsqueeze(-1).to(x.dtype)
        gate = self.smear_gate(x[..., : self.config.smear_channels])
        return smear(x, torch.cat((before, earlier), dim=1), gate, self.smear_lambda)

    def rotary(self, positions: torch.Tensor) -> Rotary:
        """cos and sin of integer positions ``[B, T]`` in the dtype of the weights."""
        return rotary_factors(positions, self.config.head_dim, self.config.rope_theta, self.lm_head.weight.dtype)

    def masks(self, x: torch.Tensor, attention_mask=None, cache: CognicaKVCache | None = None, places=None) -> dict:
        """Attention mask per layer type in the form that the chosen attention implementation wants.

        ``places`` ``[B, T]`` are those of :func:`document_places`, instead of an ``attention_mask``.
        """
        inputs = {"inputs_embeds": x, "attention_mask": attention_mask, "past_key_values": cache}
        inputs |= {} if places is None else {"attention_mask": None, "position_ids": places}
        masks = {"full_attention": create_causal_mask(self.config, **inputs)}
        if "sliding_attention" in self.config.layer_types:
            masks["sliding_attention"] = create_sliding_window_causal_mask(self.config, **inputs)
        return masks

    def run_layers(
        self, layers: Iterable[int], x, x0, ids, rotary: Rotary, masks: dict, cache: CognicaKVCache | None = None
    ) -> torch.Tensor:
        """Run the residual stream ``x`` ``[B, T, D]`` through the given layers; ``x0`` is the embedding stream."""
        for i in layers:
            embedded = self.value_embeds[str(i)](ids) if self.config.has_value_embedding(i) else None
            lambdas, mask = (self.resid_lambdas[i], self.x0_lambdas[i]), masks[self.config.layer_types[i]]
            inputs = (x, x0, *lambdas, rotary, mask, embedded, cache)
            layer = self.transformer.h[i]
            again = self.gradient_checkpointing and self.training
            x = self._gradient_checkpointing_func(layer.__call__, *inputs) if again else layer(*inputs)
        return x

    def boundary_states(
        self,
        ids: torch.Tensor,
        attention_mask=None,
        position_ids=None,
        cache=None,
        max_stages=None,
        places=None,
        local=False,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Embeddings ``x0``, the residual stream after each of the first ``max_stages`` stages; that after layer L//2.

        All are ``[B, T, D]``; the last is None where layer L//2 is not reached. ``places`` are those of
        :func:`document_places`; ``local`` lets no gradient cross from a stage into the one before.
        """
        config = self.config
        past = cache.get_seq_length() if cache is not None else 0
        self.check_ids(ids, past)
        T = ids.shape[1]
        padding = attention_mask is not None and attention_mask.ndim == 2
        real = attention_mask[:, -T:].bool() if padding else None
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=ids.device)[None]
            if padding:  # the first real token stands at 0, as generate() counts
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -T:]
        leads = real if places is None else is_followed(places, real)
        x0 = x = self.embed(ids, leads, cache.previous() if cache is not None else None)
        masks, rotary = self.masks(x, attention_mask, cache, places), self.rotary(position_ids)
        if cache is not None:
            cache.record(ids, real)
        states, middle = [x0], None
        for stage in range(max_stages or config.num_stages):
            layers, x = config.stage_layers(stage), x.detach() if local and stage else x
            half = config.num_hidden_layers // 2 + 1  # the middle is the state after layer L//2
            if layers.start < half <= layers.stop:
                x = middle = self.run_layers(range(layers.start, half), x, x0, ids, rotary, masks, cache)
                layers = range(half, layers.stop)
            x = self.run_layers(layers, x, x0, ids, rotary, masks, cache)
            states.append(x)
        return states, middle

    def check_ids(self, ids: torch.Tensor, past: int = 0) -> None:
        """Raise ValueError for ids outside the vocabulary or a text longer than the context."""
        limit = self.config.max_position_embeddings
        total = past + ids.shape[1]
        check(total <= limit, f"{total} tokens are longer than the context of {limit}; shorten the prompt")
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            self.check_vocabulary(ids)

    def check_vocabulary(self, ids: torch.Tensor) -> None:
        """Raise ValueError for ids outside the vocabulary, at the cost of waiting for the device."""
        low, high, vocab = int(ids.min()), int(ids.max()), self.config.vocab_size
        bad = low if low < 0 else high
        check(0 <= bad < vocab, f"token id {bad} is outside the vocabulary of {vocab} ids")

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: CognicaKVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits ``[B, T, V]`` fp32: the pool's log-probabilities, or the plain path's when ``poe_mode`` is none.

        Args:
            input_ids: ids ``[B, T]``.
            attention_mask: 1 at tokens and 0 at padding, ``[B, past + T]``, or a mask ``[B, 1, T, past + T]`` as is.
            position_ids: ``[B, T]`` or ``[1, T]``; where they do not go on by 1, the next document of the row begins,
                which sees nothing of those before it. Such a row has no cache.
            past_key_values: cache of the text before; made anew when ``use_cache``.
            inputs_embeds: refused.
            labels: ids ``[B, T]``, -100 where none counts; shifted by one inside. What they teach is
                ``config.finetune_objective``.
            use_cache: return a cache; the config's when None, never in training mode.
            logits_to_keep: how many of the last positions get logits, or which; all when 0.
            output_attentions: refused.
            output_hidden_states: also return the ``K + 1`` states ``[B, T, D]`` at the stages' boundaries: the smeared
                embeddings, then the residual stream behind every stage, each before its norm. The config's when None.
            return_dict: False for a tuple of what is not None; the config's when None.
            **kwargs: ``num_items_in_batch``, ``shift_labels`` and ``ignore_index`` of transformers' loss;
                ``cache_position`` if it says where the block stands anyway.

        Raises:
            ValueError: ids outside the vocabulary, a text longer than the context, embeddings instead of ids (value
                embeddings are looked up by id), attention weights asked for, documents in a row with a cache or with
                an attention implementation that cannot part them.
            TypeError: a keyword that does not exist.
        """
        config, given = self.config, past_key_values is not None
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model needs input_ids, not inputs_embeds: it looks value embeddings up by id")
        if past_key_values is not None and not isinstance(past_key_values, CognicaKVCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; pass a CognicaKVCache")
        attentions = config.output_attentions if output_attentions is None else output_attentions
        check(not attentions, "output_attentions: this model returns no attention weights; leave it out")
        kwargs = _loss_arguments(kwargs, input_ids, past_key_values)
        places = None
        if position_ids is not None:
            places = document_places(config, input_ids, position_ids, attention_mask, past_key_values)
            alone = places is None or not (given or (use_cache and not self.training))
            check(alone, "position_ids restart within a row: several documents have no cache; pass use_cache=False")
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training and places is None:
            past_key_values = CognicaKVCache(config)
        (x0, *states), middle = self.boundary_states(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            places=places,
            local=labels is not None and self.teaches_locally,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if self.config.poe_mode == "none":
            assert middle is not None
            logits = self.plain_head(states[-1][:, keep], middle[:, keep])
        else:
            logits = self._pool([x[:, keep] for x in states])
        loss = None
        if labels is not None:
            loss = self.label_loss(logits, [x[:, keep] for x in states], labels, **kwargs)
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        if hidden:
            output.hidden_states = (x0, *states)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def all_logits(self, ids: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Capped fp32 logits ``[B, T, V]`` of every stage and of the plain path, from one pass over the trunk."""
        (_, *states), middle = self.boundary_states(ids)
        assert middle is not None
        return tuple(self.stage_head(x, k) for k, x in enumerate(states)), self.plain_head(states[-1], middle)

    def forward_stage(self, ids: torch.Tensor, stage: int) -> torch.Tensor:
        """Capped fp32 logits ``[B, T, V]`` of one stage's own head; layers above the stage are not run."""
        self.check_stages([stage])
        return self.stage_head(self.boundary_states(ids, max_stages=stage + 1)[0][-1], stage)

    def forward_exit(self, ids: torch.Tensor, layer: int) -> torch.Tensor:
        """Capped fp32 logits ``[B, T, V]`` of the exit behind ``layer`` layers; those above are not run."""
        number = self.find_exit(layer)
        self.check_ids(ids)
        x0, positions = self.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.run_layers(range(layer), x0, x0, ids, self.rotary(positions), self.masks(x0))
        return self.exit_head(x, number)

    def forward_aggregated(self, ids: torch.Tensor, max_stages: int | None = None) -> torch.Tensor:
        """Log-probabilities ``[B, T, V]`` fp32 of the pool of the first ``max_stages`` stages."""
        max_stages = self.config.num_stages if max_stages is None else max_stages
        self.check_stages([max_stages - 1], "max_stages", max_stages)
        return self._pool(self.boundary_states(ids, max_stages=max_stages)[0][1:])

    def _pool(self, states: list[torch.Tensor]) -> torch.Tensor:
        return combine([self.stage_head(x, k) for k, x in enumerate(states)], self.config.poe_alpha)

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        # generate() hands its loop's own arguments on to the model.
        kwargs = {name: value for name, value in kwargs.items() if name not in ("tokenizer", "assistant_tokenizer")}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
    ):
        # generate() would make a DynamicCache, which knows neither ids nor padding.
        limit = self.config.max_position_embeddings
        much = f"prompt and new tokens make {max_cache_length + 1} tokens, more than the context of {limit}"
        check(max_cache_length <= limit, f"{much}; shorten the prompt or lower max_new_tokens")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = CognicaKVCache(self.config)


def _loss_arguments(kwargs: dict, ids: torch.Tensor, cache: CognicaKVCache | None) -> dict:
    """The keywords that transformers' loss takes; TypeError for one that nobody takes."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    position = kwargs.pop("cache_position", None)
    if position is not None and not torch.compiler.is_compiling():
        past = cache.get_seq_length() if cache is not None else 0
        stands = torch.equal(position.cpu().flatten(), torch.arange(past, past + ids.shape[1]))
        check(stands, f"cache_position differs from where the block stands, {past} to {past + ids.shape[1] - 1}")
    for name in kwargs:
        if name not in ("num_items_in_batch", "shift_labels", "ignore_index"):
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    return kwargs


CognicaPoEConfig.register_for_auto_class()
CognicaPoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
