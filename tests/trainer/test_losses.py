"""The loss of a batch is that of the plain loop, however unevenly its micro-batches count."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from torchdistpackage.errors import TrainerError
from torchdistpackage.trainer.losses import WeightedLoss, causal_lm_loss, classification_loss

LABELS = torch.tensor([[1, 2, 3, 4], [1, -100, -100, 2], [-100, -100, -100, -100], [3, 1, -100, -100]])


def total_of(loss, output, labels, parts=2):
    pairs = list(zip(output.split(parts), labels.split(parts), strict=True))
    total = sum(loss.count(label) for _, label in pairs)
    return sum(loss.share(part, label, total) for part, label in pairs)


def shifting(logits, labels):
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def not_shifting(logits, labels):
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def hugging_face(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


@pytest.mark.parametrize("function", [None, shifting, not_shifting, hugging_face])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_shares_of_uneven_tokens_sum_to_the_mean_over_all(function, rows):
    logits = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    plain = not_shifting if function is not_shifting else shifting
    found = total_of(WeightedLoss(function, is_causal_lm=True), logits, LABELS, rows)
    torch.testing.assert_close(found, plain(logits, LABELS))


@pytest.mark.parametrize(
    ("function", "labels"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, -100, 2])),
        (nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])), torch.tensor([0, 2, 1, 0, 0])),
        (nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), torch.tensor([0, 1, 1, 1, 2])),
        (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([0, 1, 1, 2, 2])),
        (nn.MSELoss(), torch.randn(5, 3)),
        (classification_loss, torch.rand(5, 3).softmax(1)),
        (None, torch.tensor([0, 2, 1, 1, 2])),
    ],
)
def test_shares_of_uneven_micro_batches_sum_to_the_loss_of_the_batch(function, labels):
    output = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = total_of(WeightedLoss(function), output, labels, 3)
    torch.testing.assert_close(found, (function or classification_loss)(output, labels))


def test_one_micro_batch_is_the_loss_itself_to_the_bit():
    logits = torch.randn(4, 4, 8)
    loss = WeightedLoss(None, is_causal_lm=True)
    assert torch.equal(loss.share(logits, LABELS, loss.count(LABELS)), causal_lm_loss(logits, LABELS))


def test_a_micro_batch_that_counts_nothing_adds_zero_and_keeps_its_graph():
    logits = torch.full((1, 4, 8), 2.0, requires_grad=True)
    share = WeightedLoss(None, is_causal_lm=True).share(logits, torch.full((1, 4), -100), 7.0)
    share.backward()
    assert share.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("function", [None, shifting, hugging_face])
def test_sums_for_evaluation_are_mean_times_count(function):
    logits = torch.randn(4, 4, 8)
    loss = WeightedLoss(function, is_causal_lm=True)
    total = sum(loss.summed(one, label) for one, label in zip(logits.split(1), LABELS.split(1), strict=True))
    torch.testing.assert_close(total / loss.count(LABELS), shifting(logits, LABELS).double(), rtol=1e-6, atol=1e-6)


def test_a_loss_of_several_elements_is_refused_with_its_shape():
    with pytest.raises(TrainerError, match=r"Tensor of shape \(2,\)"):
        WeightedLoss(lambda output, labels: output.sum(1)).share(torch.zeros(2, 3), torch.zeros(2), 2.0)


def test_something_that_is_no_function_is_refused():
    with pytest.raises(TrainerError, match="got str"):
        WeightedLoss("cross_entropy")


def test_labels_of_tokens_are_classified_where_they_are_no_next_tokens():
    logits, labels = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    found = total_of(WeightedLoss(None), logits, labels, 1)
    torch.testing.assert_close(found, functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_one_label_a_row_is_no_next_token():
    logits, labels = torch.randn(4, 3), torch.randint(0, 3, (4,))
    found = total_of(WeightedLoss(None, is_causal_lm=True), logits, labels, 3)
    torch.testing.assert_close(found, functional.cross_entropy(logits, labels))


def test_an_output_without_logits_asks_for_a_loss_function():
    with pytest.raises(TrainerError, match="a dict without logits: pass compute_loss_func"):
        WeightedLoss(None).share({"hidden": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.long), 2.0)


def test_a_loss_of_the_users_is_asked_whether_it_shifts_under_any_model():
    logits = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0))
    for function in (shifting, not_shifting):
        torch.testing.assert_close(total_of(WeightedLoss(function), logits, LABELS, 1), function(logits, LABELS))


def test_what_is_counted_may_be_known_before():
    loss, logits = WeightedLoss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 4.0]))), torch.zeros(2, 3)
    labels = torch.tensor([1, 2])
    assert loss.count(labels) == 6.0
    torch.testing.assert_close(loss.share(logits, labels, 12.0, counted=6.0), loss.share(logits, labels, 12.0))
    assert loss.share(logits, labels, 12.0, counted=0.0) == 0
