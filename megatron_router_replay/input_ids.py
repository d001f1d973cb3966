"""Where a model's token ids are seen."""

from __future__ import annotations

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from torch import nn


def first_embeddings(chunk: nn.Module) -> list[LanguageModelEmbedding]:
    """Embeddings that a chunk's model is called through: that of the model with `pre_process`.

    The copy that the last stage has for multi-token prediction looks up the tokens after these and is left out.
    """
    models = [module for module in chunk.modules() if getattr(module, "pre_process", False)]
    embeddings = [getattr(model, "embedding", None) for model in models]
    return [each for each in embeddings if isinstance(each, LanguageModelEmbedding)]
