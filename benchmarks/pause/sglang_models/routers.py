"""A Qwen3-MoE that is nothing but its routers: SGLang's own TopK in every layer, no attention and no experts.

Its tokens cost so little that requests of 32k tokens fit a server on the CPU. To the scheduler it is a model like
others: tokens have KV slots, prefixes are cached, and every layer reports its choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import Tensor, nn

_POSITIONS = 509


class Qwen3MoeForCausalLM(nn.Module):
    """Every layer routes a vector of the token and its position; the next token is that of the highest logit."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(0)
        # Buffers: what the loader fills with random numbers of its own are weights alone, and all but equal.
        for name, shape in (
            ("tokens", (config.vocab_size, config.hidden_size)),
            ("positions", (_POSITIONS, config.hidden_size)),
            ("gates", (config.num_hidden_layers, config.hidden_size, config.num_experts)),
        ):
            values = torch.randn(shape, generator=generator, dtype=torch.float32)
            self.register_buffer(name, values.to(torch.get_default_dtype()), persistent=False)
        self.routers = nn.ModuleList(
            TopK(config.num_experts_per_tok, layer_id=layer, output_format=TopKOutputFormat.STANDARD)
            for layer in range(config.num_hidden_layers)
        )
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, *others: Any, **more: Any) -> Any:
        """Logits of the batch's last tokens, as SGLang's models give them."""
        hidden = self.tokens[input_ids] + self.positions[positions % _POSITIONS]
        for gate, router in zip(self.gates, self.routers, strict=True):
            router(hidden, hidden @ gate)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """There are none: the server is started with `--load-format=dummy`."""


EntryClass = Qwen3MoeForCausalLM
