"""Compares a traced model's stages with the model: the same bits in, the same bits out, the same gradients."""

import pytest
import torch
import torch.export
from torch import nn
from torch.utils._pytree import tree_leaves


def loss_of(output):
    return sum(
        leaf.float().square().sum()
        for leaf in tree_leaves(vars(output) if hasattr(output, "hidden") else output)
        if isinstance(leaf, torch.Tensor)
    )


def assert_same(model, pipe, *args, **kwargs):
    """Output and gradients, bitwise."""
    found = []
    for run in (model, pipe):
        model.zero_grad()
        torch.manual_seed(1)
        output = run(*args, **kwargs)
        loss_of(output).backward()
        found.append((output, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}))
    (mine, gradients), (theirs, others) = found
    assert type(mine) is type(theirs)
    for a, b in zip(
        tree_leaves(getattr(mine, "logits", mine)), tree_leaves(getattr(theirs, "logits", theirs)), strict=True
    ):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    for name, gradient in gradients.items():
        assert (gradient is None) == (others[name] is None), name
        assert gradient is None or torch.equal(gradient, others[name]), name


def needs_export_of_vmap():
    """Skips a test whose model takes norms inside of `torch.func.vmap`, which older torch.export cannot record."""

    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return torch.func.vmap(lambda row: row * torch.linalg.vector_norm(row))(self.linear(x))

    try:
        torch.export.export(Norms(), (torch.randn(3, 6),), strict=False)
    except RuntimeError as error:
        pytest.skip(f"this torch.export cannot record a norm inside of torch.func.vmap: {error}")
