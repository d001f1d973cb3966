"""What runs in the scheduler's process; SGLang finds it by the metadata beside it."""
