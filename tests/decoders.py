"""What the tests of trainers share: a tiny Llama or Gemma, a loss, a batch."""

import pytest
import torch
from language_models import language_model
from torch import nn


def decoder(layers=4, *, tied=False, **options):
    """Llama, or Gemma, whose head is its embedding; a few thousand parameters."""
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return language_model("Gemma" if tied else "Llama", layers, **{**sizes, "num_key_value_heads": 1, **options})


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def batch(rows, tokens=6):
    """Ids, and a mask that hides the begin of the first row."""
    ids = torch.randint(1, 64, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return ids, mask
