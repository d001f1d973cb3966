"""Play conversations of the calculator task against a rollout server, and keep what the trainer needs of them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from examples.calculator.game import ERROR, MAX_TURN_TOKENS, Calculator, Problem, prompt_text, reply_text
from router_replay.masks import Rollout, RoutingMasks, open_store

# The untouched distribution, so that the log-probabilities in the answer are those of the sampler.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": MAX_TURN_TOKENS}
GREEDY = {"temperature": 0.0, "max_new_tokens": MAX_TURN_TOKENS}


class RolloutError(RuntimeError):
    """The rollout server refused a request, or could not be reached."""


@dataclass(frozen=True, eq=False)
class Conversation:
    """A finished conversation of n tokens.

    Attributes:
        token_ids: n ids, as the server read and sampled them.
        sampled: n flags, True where the model wrote the token.
        rollout_logprobs: n log-probabilities in nats, by the server at the time of sampling; 0 where not sampled.
        masks: routes of the tokens 0 to n - 2, joined from the turns' deltas.
        num_turns: requests that it took.
        correct: the model's answer solves the problem.
        prefix_cached_tokens: prompt tokens whose KV the server had, over all turns.
        masks_bytes: size of all turns' masks in the answers' JSON.
        cut_off: a turn ended at its limit of tokens, or the conversation at its limit of turns without an answer.
        bad_calls: turns that the calculator answered with an error.
        top_k: what the sampler's `top_logprobs` most probable tokens were at the sampled ones, in their order: pairs of
            log-probability and id; empty lists where none were asked for.
    """

    token_ids: list[int]
    sampled: list[bool]
    rollout_logprobs: list[float]
    masks: RoutingMasks
    num_turns: int
    correct: bool
    prefix_cached_tokens: int
    masks_bytes: int
    cut_off: bool = False
    bad_calls: int = 0
    top_k: list[list[tuple[float, int]]] = field(default_factory=list)


def play(
    server_url: str,
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    *,
    concurrency: int = 16,
    sampling: Mapping[str, Any] = SAMPLING,
    top_logprobs: int = 0,
    on_finished: Callable[[Conversation], None] = lambda conversation: None,
) -> list[Conversation]:
    """One conversation per problem, in the problems' order, up to `concurrency` of them at a time.

    Args:
        server_url: of a running SGLang server with router capture.
        sampling: SGLang's sampling parameters.
        top_logprobs: how many of the most probable tokens to ask for at each sampled one.
        on_finished: called in this thread as conversations end, in any order.

    Raises:
        RolloutError: the server refused a request, or could not be reached.
        router_replay.errors.DataError: the server returns no routing masks.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [
            pool.submit(converse, server_url, problem, tokenizer, sampling, top_logprobs) for problem in problems
        ]
        try:
            for future in as_completed(futures):
                on_finished(future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def converse(
    server_url: str,
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Mapping[str, Any] = SAMPLING,
    top_logprobs: int = 0,
) -> Conversation:
    """Play one conversation; arguments and errors as of `play`."""
    calculator = Calculator(problem)
    token_ids: list[int] = []
    sampled: list[bool] = []
    logprobs: list[float] = []
    rollout = Rollout()
    handles: list[Mapping[str, Any]] = []
    top_k: list[list[tuple[float, int]]] = []
    cached = masks_bytes = bad_calls = 0
    cut_off = False

    def append(ids: Sequence[int], ids_logprobs: Sequence[float] | None = None) -> None:
        token_ids.extend(ids)
        sampled.extend([ids_logprobs is not None] * len(ids))
        logprobs.extend(ids_logprobs or [0.0] * len(ids))

    append(_encode(tokenizer, prompt_text(problem)))
    while not calculator.done:
        body = {
            "input_ids": token_ids,
            "sampling_params": {**sampling, "stop_token_ids": [tokenizer.eos_token_id]},
            "return_logprob": True,
            "top_logprobs_num": top_logprobs,
            # Earlier turns' routes are here already; only the tokens since then are new.
            **rollout.request_fields(token_ids),
        }
        meta_info = post(server_url, "/generate", body)["meta_info"]
        masks_bytes += len(json.dumps(meta_info["routing_masks"]))
        cached += meta_info["cached_tokens"]
        turn = [token_id for _, token_id, *_ in meta_info["output_token_logprobs"]]
        rollout.add(meta_info, turn)
        handles += meta_info["routing_masks"]
        append(turn, [logprob for logprob, *_ in meta_info["output_token_logprobs"]])
        top_k += top_k_of(meta_info, len(turn), top_logprobs)
        cut_off |= meta_info["finish_reason"]["type"] == "length"
        written = turn[:-1] if turn[-1] == tokenizer.eos_token_id else turn
        reply = calculator.step(str(tokenizer.decode(written)))
        bad_calls += reply == ERROR
        append(_encode(tokenizer, reply_text(reply)))
    masks = rollout.join()
    for handle in handles:
        # One process is all who needs them. A store keeps what nobody deletes, until it is full.
        with open_store(handle["store"]) as store:
            store.delete(handle)
    return Conversation(
        token_ids=token_ids,
        sampled=sampled,
        rollout_logprobs=logprobs,
        masks=masks,
        num_turns=calculator.turns,
        correct=calculator.correct,
        prefix_cached_tokens=cached,
        masks_bytes=masks_bytes,
        cut_off=cut_off or not calculator.answered,
        bad_calls=bad_calls,
        top_k=top_k,
    )


def top_k_of(meta_info: Mapping[str, Any], num_tokens: int, count: int) -> list[list[tuple[float, int]]]:
    """Log-probability and id of the most probable tokens at each sampled one, from an answer of SGLang.

    Raises:
        RolloutError: the answer has others than were asked for.
    """
    found = meta_info["output_top_logprobs"] if count else [[]] * num_tokens
    if [len(each or []) for each in found] != [count] * num_tokens:
        raise RolloutError(
            f"{count} most probable tokens were asked for at each of {num_tokens} sampled ones, and the answer has"
            f" {[len(each or []) for each in found][:8]} at {len(found)}"
        )
    return [[(logprob, token_id) for logprob, token_id, *_ in each] for each in found]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def post(server_url: str, path: str, body: Mapping[str, Any]) -> Any:
    """The server's answer to a JSON body.

    Raises:
        RolloutError: the server refused it, or could not be reached.
    """
    request = urllib.request.Request(
        server_url.rstrip("/") + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        detail = error.read(500).decode(errors="replace")
        raise RolloutError(f"the server at {server_url} refused a request ({error.code}): {detail}") from error
    except OSError as error:
        raise RolloutError(
            f"the server at {server_url} does not answer ({error}): check the address, and that SGLang runs there"
        ) from error
