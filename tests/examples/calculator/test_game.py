"""The calculator task, its tokenizer, and the shape of the committed checkpoint."""

import ast
import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from examples.calculator.game import (
    END,
    ERROR,
    MAX_TURN_TOKENS,
    MAX_TURNS,
    MAX_VALUE,
    SYSTEM_TEXT,
    Calculator,
    parse,
    problems,
    prompt_text,
    reference_pieces,
    reply_text,
)
from examples.calculator.tokenizer import ALPHABET, SPECIAL_TOKENS, UNKNOWN, build_tokenizer
from examples.small_model import CHECKPOINT


@pytest.fixture(scope="module")
def sample():
    """Problems of both splits."""
    return [*islice(problems("train", 0), 200), *islice(problems("held_out", 0), 200)]


@pytest.fixture(scope="module", params=["built", "stored"])
def tokenizer(request):
    return build_tokenizer(2048) if request.param == "built" else AutoTokenizer.from_pretrained(CHECKPOINT)


def evaluate(expression: str) -> int:
    """The value of an arithmetic expression, by Python's own rules of precedence."""
    assert not any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(ast.parse(expression)))
    return eval(expression)


# --- problems -----------------------------------------------------------------------------------------------------


def test_answers_are_the_values_of_the_expressions(sample):
    assert [p.answer for p in sample] == [evaluate(p.expression) for p in sample]


def test_splits_share_no_problem_whatever_the_seed():
    trained = {p.expression for seed in range(3) for p in islice(problems("train", seed), 1000)}
    held_out = {p.expression for seed in range(3) for p in islice(problems("held_out", seed), 1000)}
    assert len(trained) > 2000 and len(held_out) > 2000
    assert {parse(expression).split for expression in trained} == {"train"}
    assert {parse(expression).split for expression in held_out} == {"held_out"}
    assert trained.isdisjoint(held_out)


def test_a_seed_gives_the_same_problems_and_another_seed_others():
    first, again, other = (list(islice(problems("train", seed), 20)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_problems_take_two_to_four_operations_on_small_values(sample):
    assert {len(p.steps) for p in sample} == {2, 3, 4}
    operands = [value for p in sample for left, _, right in p.steps for value in (left, right)]
    assert min(operands) >= 0 and max(operands) <= MAX_VALUE


@pytest.mark.parametrize(
    ("expression", "steps"),
    [
        ("7+(12-3)*4", ((12, "-", 3), (9, "*", 4), (7, "+", 36))),
        ("2+3*4-5*1", ((3, "*", 4), (5, "*", 1), (2, "+", 12), (14, "-", 5))),
        ("9-4-3", ((9, "-", 4), (5, "-", 3))),
        ("9-(4-3)", ((4, "-", 3), (9, "-", 1))),
    ],
)
def test_reference_order_of_operations(expression, steps):
    assert parse(expression).steps == steps


@pytest.mark.parametrize("expression", ["", "7", "1+", "+1", "1+2)", "(1+2", "(1+2+3)*4", "1/2", "1+a", "1)2", "1 2"])
def test_parse_refuses_what_is_not_an_expression(expression):
    with pytest.raises(ValueError, match=r"expression|parentheses"):
        parse(expression)


# --- the environment ----------------------------------------------------------------------------------------------


def test_the_reference_conversation_is_judged_correct_and_is_what_the_environment_replies(sample):
    for problem in sample:
        calculator = Calculator(problem)
        pieces = reference_pieces(problem)
        assert pieces[0] == (prompt_text(problem), False)
        for turn, reply in zip(pieces[1::2], [*pieces[2::2], ("", False)], strict=True):
            assert turn[1] and not calculator.done
            assert (reply_text(calculator.step(turn[0])), False) == reply
        assert calculator.done and calculator.correct


def test_a_wrong_answer_ends_the_episode_and_is_judged_wrong():
    problem = parse("2+3*4")
    calculator = Calculator(problem)
    assert calculator.step(f"answer {problem.answer + 1}{END}") is None
    assert calculator.done and not calculator.correct


def test_another_order_of_calls_is_as_good():
    calculator = Calculator(parse("2*3+4*5"))
    assert [calculator.step(turn) for turn in ("call 4*5", "call 2*3", "call 6+20", "answer 26")] == [
        "20",
        "6",
        "26",
        None,
    ]
    assert calculator.correct


def test_negative_results_can_be_used_again():
    calculator = Calculator(parse("3-5+1"))
    assert calculator.step(f"call 3-5{END}") == "-2"
    assert calculator.step(f"call -2+1{END}") == "-1"
    assert calculator.step(f"answer -1{END}") is None
    assert calculator.correct


@pytest.mark.parametrize(
    "turn",
    ["", "call", "call 1/2", "call 1+2+3", "call 1+2 ", "call 10000+1", "answer", "answer 6.0", "6", f"{END}{END}"],
)
def test_a_malformed_turn_gets_an_error_and_the_episode_goes_on(turn):
    calculator = Calculator(parse("1+2+3"))
    assert calculator.step(turn) == ERROR
    assert not calculator.done
    calculator.step("answer 6")
    assert calculator.correct


def test_the_turns_are_bounded():
    calculator = Calculator(parse("1+2+3"))
    replies = [calculator.step("call 1+2") for _ in range(MAX_TURNS)]
    assert replies == ["3"] * (MAX_TURNS - 1) + [None]
    assert calculator.done and not calculator.correct
    with pytest.raises(RuntimeError, match="over"):
        calculator.step("answer 6")


def test_the_last_allowed_turn_may_answer():
    calculator = Calculator(parse("1+2+3"))
    for _ in range(MAX_TURNS - 1):
        calculator.step("?")
    calculator.step("answer 6")
    assert calculator.correct


# --- the tokenizer ------------------------------------------------------------------------------------------------


@given(text=st.lists(st.sampled_from([*ALPHABET, *(set(SPECIAL_TOKENS) - {UNKNOWN})]), max_size=60).map("".join))
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_one_token_per_character_and_none_added(tokenizer):
    assert len(tokenizer.encode(ALPHABET)) == len(ALPHABET)
    assert tokenizer.encode("") == []
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"a b{END}")) == ["a", " ", "b", END]
    assert tokenizer.eos_token == END


def test_a_foreign_character_is_visibly_unknown(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aéb")) == ["a", UNKNOWN, "b"]


def test_turn_by_turn_token_ids_are_those_of_the_whole_text(tokenizer, sample):
    for problem in sample[::20]:
        pieces = [text for text, _ in reference_pieces(problem)]
        assert [i for text in pieces for i in tokenizer.encode(text)] == tokenizer.encode("".join(pieces))


def test_conversation_lengths(tokenizer, sample):
    for problem in sample:
        lengths = [(len(tokenizer.encode(text)), is_model) for text, is_model in reference_pieces(problem)]
        assert 60 <= sum(length for length, _ in lengths) <= 200
        assert max(length for length, is_model in lengths if is_model) < MAX_TURN_TOKENS


def test_the_chat_template_gives_the_task_s_own_text(tokenizer):
    problem = parse("7+(12-3)*4")
    messages = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": problem.question}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == prompt_text(problem)
    messages += [{"role": "assistant", "content": "call 12-3"}, {"role": "tool", "content": "9"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "".join(
        text for text, _ in reference_pieces(problem)[:3]
    )


# --- the checkpoint -----------------------------------------------------------------------------------------------


def test_checkpoint_is_a_qwen3_moe_with_a_dense_first_layer(tokenizer):
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert config.mlp_only_layers == [0] and config.decoder_sparse_step == 1
    assert config.num_hidden_layers - len(config.mlp_only_layers) >= 4
    assert config.num_experts >= 32 and config.num_experts_per_tok == 4 and config.norm_topk_prob
    assert config.eos_token_id == tokenizer.eos_token_id and config.vocab_size == len(tokenizer)


def test_checkpoint_config_has_the_names_of_both_generations_of_transformers():
    raw = json.loads((CHECKPOINT / "config.json").read_text())
    assert raw["num_experts"] == AutoConfig.from_pretrained(CHECKPOINT).num_experts
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10000.0


def test_checkpoint_has_one_tensor_per_expert_in_bfloat16():
    config = AutoConfig.from_pretrained(CHECKPOINT)
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert {name for name in names if ".experts." in name} == {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(1, config.num_hidden_layers)
        for expert in range(config.num_experts)
        for projection in ("gate", "up", "down")
    }
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert {name for name in names if name.endswith("mlp.gate.weight")} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in range(1, config.num_hidden_layers)
    }


def test_checkpoint_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8 * 2**20
