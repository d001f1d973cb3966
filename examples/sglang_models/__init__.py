"""Models for SGLang's own seam for models outside of it: SGLANG_EXTERNAL_MODEL_PACKAGE=examples.sglang_models."""
