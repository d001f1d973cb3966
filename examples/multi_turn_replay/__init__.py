"""Multi-turn rollout in SGLang, log-probabilities in Megatron-Core, with and without routing replay."""
