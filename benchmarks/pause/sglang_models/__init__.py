"""Models from outside SGLang, by its own seam: SGLANG_EXTERNAL_MODEL_PACKAGE names this package."""
