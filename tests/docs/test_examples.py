"""The examples of the documents run as they stand, and do what the text beside them says."""

from __future__ import annotations

import traceback

import pytest
import torch

from router_replay.mismatch import grpo_loss
from router_replay.run import Dynamics, find_files, read_run
from tests.docs.examples import ROOT, documents, examples, run


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_examples_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(path)


def test_the_step_of_the_reports_page_is_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(ROOT / "docs" / "report.md")
    step, *others = read_run(find_files([tmp_path / "run"]))
    assert step.step == 12 and int(step.responses.mask.sum()) == 5
    assert [(each.step, each.dynamics) for each in others] == [(13, found["dynamics"]), (14, Dynamics(evaluation=0.4))]
    assert step.rollout_logprobs.equal(found["rollout_logprobs"])


def test_the_loss_of_micro_batches_is_that_of_the_batch():
    """docs/corrections.md: parameters after the step, and the metrics, are those of a batch in one piece."""
    found = run(ROOT / "docs" / "corrections.md")
    torch.manual_seed(0)
    torch.randint(32, (4, 7))
    policy = torch.nn.Embedding(32, 32)
    before = policy.weight.detach().clone()
    assert not found["policy"].weight.equal(before)
    logits = policy(found["tokens"][:, :-1])
    loss, metrics = grpo_loss(
        current=logits.log_softmax(-1).gather(-1, found["tokens"][:, 1:, None])[..., 0],
        old=found["old_logprobs"],
        advantages=found["advantages"],
        responses=found["responses"],
        weights=found["weights"],
    )
    loss.backward()
    # Float32 gradients of size 0.1 in another order.
    torch.testing.assert_close(found["policy"].weight, before - policy.weight.grad, rtol=0, atol=1e-6)
    assert found["total"].flat() == pytest.approx(metrics.flat(), rel=1e-6, abs=1e-9)


def test_an_error_names_the_line_of_the_document(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "# Title\n\n<!-- run -->\n```python\none = 1\n```\ntext\n<!-- run -->\n```python\none\nabsent\n```\n"
    )
    with pytest.raises(NameError) as caught:
        run(path)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == (str(path), 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- run -->\ntext\n```python\n1\n```\n", "line 1: the mark of an example has no python block"),
        ("\n<!-- run -->\n```bash\nls\n```\n", "line 2: the mark of an example has no python block"),
        ("<!-- run it -->\n```python\n1\n```\n", "a line of its own"),
    ],
)
def test_a_mark_without_an_example_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        list(examples(text))
