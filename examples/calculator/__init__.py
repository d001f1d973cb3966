"""A calculator for a model to talk to: problems, the conversation's rules, and the tokenizer that writes them."""
