"""SGLang's real server without a GPU."""
