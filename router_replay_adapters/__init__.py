"""Adapters for stacks that record by SGLang and replay by themselves; each is imported by the stack that it is for."""
