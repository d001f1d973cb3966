"""The sampler's top-k, as it is taken and as it is refused."""

from __future__ import annotations

import math

import pytest
import torch

from router_replay.errors import InputError
from router_replay.mismatch import Responses, SamplerTopK

MASK = torch.tensor([[False, True, True], [False, True, False]])
RESPONSES = Responses.padded(MASK)


def _given() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[[9, 9], [0, 4], [3, 1]], [[-7, 2], [4, -1], [8, 8]]])
    probs = torch.tensor([[[2.0, 2.0], [0.5, 0.25], [0.9, 0.1]], [[3.0, 1.0], [0.125, math.nan], [9.0, 1.0]]])
    return {"token_ids": ids, "logprobs": probs.log()}


def _made(**changed) -> SamplerTopK:
    return SamplerTopK.of(**{**_given(), "responses": RESPONSES, "vocab_size": 5, **changed})


def test_what_is_no_response_token_is_left_out():
    found = _made()
    assert found.token_ids[~MASK].unique().tolist() == [-1] and not found.logprobs[~MASK].any()
    assert found.token_ids[MASK].tolist() == [[0, 4], [3, 1], [4, -1]]
    torch.testing.assert_close(found.mass, torch.tensor([[0, 0.75, 1.0], [0, 0.125, 0]]))


def test_integers_of_any_width_and_logarithms_of_any_precision_are_taken():
    found = _made(token_ids=_given()["token_ids"].int(), logprobs=_given()["logprobs"].bfloat16())
    assert found.token_ids.dtype == torch.int64 and found.logprobs.dtype == torch.float32
    assert _made(logprobs=_given()["logprobs"].double()).logprobs.dtype == torch.float64
    leaf = _given()["logprobs"].requires_grad_()
    assert not _made(logprobs=leaf).logprobs.requires_grad


def test_no_tokens_at_all():
    empty = _made(token_ids=torch.empty(2, 3, 0, dtype=torch.int64), logprobs=torch.empty(2, 3, 0))
    assert empty.token_ids.shape == (2, 3, 0) and not empty.mass.any()


@pytest.mark.parametrize(
    ("place", "token_id", "logprob", "message"),
    [
        ((0, 1, 1), 5, -2.0, r"at 1 response tokens .* not in \[0, 5\), nor -1; the first, at \[0, 1\], has \[0, 5\]"),
        ((0, 1, 1), -2, -2.0, "nor -1"),
        ((0, 1, 1), 0, -2.0, r"lists a token twice; the first, at \[0, 1\], has \[0, 0\].*Do not add the sampled"),
        ((0, 2, 1), 1, math.nan, r"not finite, or above 0; the first, at \[0, 2\], has \[-0.1054, nan\]"),
        ((0, 2, 1), 1, -math.inf, "the id -1 where there is no token"),
        ((0, 2, 1), 1, 0.5, "pass natural logarithms"),
        ((0, 2, 1), 1, -0.7, r"sum to more than 1; the first, at \[0, 2\], has 1.397"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_place(place, token_id, logprob, message):
    given = _given()
    given["token_ids"][place], given["logprobs"][place] = token_id, logprob
    with pytest.raises(InputError, match=message):
        _made(**given)


def test_a_mass_that_rounding_leaves_is_taken():
    given = _given()
    given["logprobs"][0, 2] = torch.tensor([0.9, 0.101]).log()
    assert _made(**given).mass[0, 2] > 1


def test_shapes_and_kinds_that_do_not_fit_are_refused():
    given = _given()
    for changed, message in (
        ({"token_ids": given["token_ids"][:, :2]}, r"token_ids \[2, 2, 2\] of the sampler's top-k must be"),
        ({"logprobs": given["logprobs"][..., :1]}, r"logprobs \[2, 3, 1\] of the sampler's top-k must be"),
        ({"token_ids": given["token_ids"].double()}, "token_ids must be integers"),
        ({"logprobs": given["token_ids"]}, "logprobs floating point, got torch.int64 and torch.int64"),
        ({"token_ids": given["token_ids"].tolist()}, "token_ids must be a torch.Tensor"),
        ({"token_ids": torch.tensor(3)}, "must be the response mask's shape"),
        ({"responses": MASK}, "responses must be a Responses"),
    ):
        with pytest.raises(InputError, match=message):
            _made(**changed)
