"""Examples: a small mixture-of-experts model, its task, and programs that use them."""
