"""A multi-turn task with a verifiable answer: arithmetic with a calculator that does one operation per call.

One conversation, as the model sees it (one line here, no line breaks in the text):

    <|system|>Use the calculator.<|end|><|user|>What is 7+(12-3)*4?<|end|>
    <|assistant|>call 12-3<|end|><|tool|>9<|end|><|assistant|>call 9*4<|end|><|tool|>36<|end|>
    <|assistant|>call 7+36<|end|><|tool|>43<|end|><|assistant|>answer 43<|end|>

Playing it needs only text and a tokenizer:

    ids = tokenizer.encode(prompt_text(problem))
    calculator = Calculator(problem)
    while not calculator.done:
        turn = <sample from ids, at most MAX_TURN_TOKENS tokens, stop at END>
        ids += turn
        reply = calculator.step(tokenizer.decode(turn))
        ids += tokenizer.encode(reply_text(reply))       # empty once the episode is over
    reward = float(calculator.correct)
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

SYSTEM, USER, ASSISTANT, TOOL, END = "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"

SYSTEM_TEXT = "Use the calculator."
MAX_TURNS = 6
"""Assistant turns in an episode; a reference conversation takes three to five."""
MAX_TURN_TOKENS = 16
"""Tokens in one assistant turn, END included; reference turns take at most 15."""
MAX_VALUE = 9999
"""Largest operand of a call; no value in a reference conversation is larger, or negative."""

FEWEST_OPERATIONS, MOST_OPERATIONS = 2, 4
"""Of a problem of the streams."""

ERROR = "error"
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_CALL = re.compile(r"call (-?[0-9]{1,4})([+*-])(-?[0-9]{1,4})")
_ANSWER = re.compile(r"answer (-?[0-9]{1,8})")

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Problem:
    """An arithmetic expression of two to four operations, e.g. `7+(12-3)*4`.

    `steps` are the operations in the order in which the reference does them, each `(left, operator, right)`.
    """

    expression: str
    steps: tuple[tuple[int, str, int], ...]

    @property
    def answer(self) -> int:
        """The value of the expression."""
        return _apply(self.steps[-1])

    @property
    def question(self) -> str:
        """The user's text."""
        return f"What is {self.expression}?"

    @property
    def split(self) -> Split:
        """Where the problem belongs; a function of its text alone, so that the two splits cannot share a problem."""
        return "held_out" if hashlib.sha256(self.expression.encode()).digest()[0] < 32 else "train"


def problems(split: Split, seed: int | str) -> Iterator[Problem]:
    """Endless stream of problems of one split, the same for the same seed. Problems may repeat within a stream."""
    rng = random.Random(f"{split}/{seed}")
    while True:
        problem = parse(_random_expression(rng))
        values = [_apply(step) for step in problem.steps]
        if problem.split == split and all(0 <= value <= MAX_VALUE for value in values):
            yield problem


def parse(expression: str) -> Problem:
    """The problem of an expression of non-negative integers, `+ - *` and pairs of parentheses around one operation.

    Raises:
        ValueError: the text is not such an expression.
    """
    items: list[int | str] = [int(t) if t.isdigit() else t for t in re.findall(r"[0-9]+|.", expression)]
    steps: list[tuple[int, str, int]] = []
    while len(items) > 1:
        at = _next_operation(items)
        step = tuple(items[at - 1 : at + 2])
        if [type(item) for item in step] != [int, str, int] or step[1] not in _OPERATIONS:
            raise ValueError(f"not an arithmetic expression of the calculator task: {expression!r}")
        steps.append(step)
        enclosed = items[at - 2 : at - 1] == ["("]
        if enclosed and items[at + 2 : at + 3] != [")"]:
            raise ValueError(f"parentheses must enclose one operation: {expression!r}")
        items[at - 1 - enclosed : at + 2 + enclosed] = [_apply(step)]
    if not steps:
        raise ValueError(f"an expression needs at least one operation: {expression!r}")
    return Problem(expression, tuple(steps))


def prompt_text(problem: Problem) -> str:
    """Text up to where the model's first turn starts."""
    return f"{SYSTEM}{SYSTEM_TEXT}{END}{USER}{problem.question}{END}{ASSISTANT}"


def reply_text(reply: str | None) -> str:
    """Text between two turns of the model: the tool's reply and the next turn's opening. Empty for `None`."""
    return "" if reply is None else f"{TOOL}{reply}{END}{ASSISTANT}"


def reference_pieces(problem: Problem) -> list[tuple[str, bool]]:
    """The reference conversation as `(text, is_model)` pieces in order; `is_model` marks what the model writes."""
    pieces = [(prompt_text(problem), False)]
    for left, sign, right in problem.steps:
        pieces.append((f"call {left}{sign}{right}{END}", True))
        pieces.append((reply_text(str(_apply((left, sign, right)))), False))
    pieces.append((f"answer {problem.answer}{END}", True))
    return pieces


@dataclass
class Calculator:
    """The environment of one episode: takes the model's turns, gives the tool's replies, judges the answer."""

    problem: Problem
    done: bool = field(default=False, init=False)
    answered: bool = field(default=False, init=False)
    correct: bool = field(default=False, init=False)
    turns: int = field(default=0, init=False)

    def step(self, turn: str) -> str | None:
        """Take one assistant turn, with or without its closing END.

        Returns the tool's reply (a number, or `error` for what is neither a call nor an answer), or `None` when the
        episode is over: after an answer, or after `MAX_TURNS` turns. `answered` and `correct` then hold the outcome.

        Raises:
            RuntimeError: the episode is over already.
        """
        if self.done:
            raise RuntimeError("the episode is over: an answer was given or the turns are used up")
        self.turns += 1
        turn = turn.removesuffix(END)
        if answer := _ANSWER.fullmatch(turn):
            self.correct = int(answer[1]) == self.problem.answer
        self.answered = answer is not None
        self.done = self.answered or self.turns == MAX_TURNS
        if self.done:
            return None
        call = _CALL.fullmatch(turn)
        return str(_apply((int(call[1]), call[2], int(call[3])))) if call else ERROR


def _apply(step: tuple[int, str, int]) -> int:
    left, sign, right = step
    return _OPERATIONS[sign](left, right)


def _next_operation(items: list[int | str]) -> int:
    """Index of the operation to do first: the leftmost in parentheses, else the leftmost `*`, else the leftmost."""
    if "(" in items:
        return items.index("(") + 2
    if "*" in items:
        return items.index("*")
    return 1


def _random_expression(rng: random.Random) -> str:
    operands = [str(rng.randint(1, 99)) for _ in range(rng.randint(FEWEST_OPERATIONS + 1, MOST_OPERATIONS + 1))]
    first = 0
    while first < len(operands) - 1:
        if rng.random() < 0.25:
            operands[first] = "(" + operands[first]
            operands[first + 1] += ")"
            first += 1
        first += 1
    return operands[0] + "".join(rng.choice("+-*") + operand for operand in operands[1:])
