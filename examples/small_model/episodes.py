"""Episodes of the calculator task, played by a Hugging Face model in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from examples.calculator.game import MAX_TURN_TOKENS, Calculator, Problem, prompt_text, reply_text


@torch.inference_mode()
def solve(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Problem], seed: int
) -> list[bool]:
    """Play one episode per problem, sampling at temperature 1 over the whole vocabulary; whether each was solved.

    All episodes advance by one token per step, either sampled or dictated by the environment, so that one KV cache
    without padding serves the batch.
    """
    generator = torch.Generator().manual_seed(seed)
    calculators = [Calculator(problem) for problem in batch]
    prompts = [tokenizer.encode(prompt_text(problem)) for problem in batch]
    shared = min(map(len, prompts))
    dictated = [deque(prompt[shared:]) for prompt in prompts]
    turns: list[list[int]] = [[] for _ in batch]
    step = torch.tensor([prompt[:shared] for prompt in prompts])
    cache = None
    while not all(calculator.done for calculator in calculators):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        sampled = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)[:, 0].tolist()
        for index, calculator in enumerate(calculators):
            if calculator.done:
                sampled[index] = tokenizer.pad_token_id
            elif dictated[index]:
                sampled[index] = dictated[index].popleft()
            else:
                turns[index].append(sampled[index])
                if sampled[index] == tokenizer.eos_token_id or len(turns[index]) == MAX_TURN_TOKENS:
                    reply = calculator.step(tokenizer.decode(turns[index]))
                    dictated[index].extend(tokenizer.encode(reply_text(reply)))
                    turns[index] = []
        step = torch.tensor(sampled)[:, None]
    return [calculator.correct for calculator in calculators]
