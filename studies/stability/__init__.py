"""Does the mismatch of routes destroy training, and does replay prevent it: GRPO and GSPO on both real engines."""
