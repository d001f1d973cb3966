"""GRPO on the calculator task: rollouts in SGLang, training in Megatron-Core, with or without routing replay."""
