"""SGLang plugin: keeps each token's top-k experts beside its KV cache entry and returns them with the answer."""
