"""Small language models of transformers, from configurations, with random weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]

OPTIONS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4, "layer_types": MIXED},
    "Phi3": {"resid_pdrop": 0.0, "sliding_window": 4},
    "Olmo2": {},
    "GPTNeoX": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
"""The families that must work."""

MORE: dict[str, dict[str, Any]] = {
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Bloom": {"n_head": 4},
    "Falcon": {},
    "GPTJ": {"n_embd": 32, "n_head": 4, "rotary_dim": 8, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Gemma3nText": {"head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "laurel_rank": 4,
                    "hidden_size_per_layer_input": 8, "sliding_window": 4, "layer_types": MIXED,
                    "activation_sparsity_pattern": [0.0] * 5},
    "RoFormer": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "XLMRoberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}  # fmt: skip
"""A few that are built in other ways."""


def configuration(family: str, layers: int = 5, **options: Any) -> Any:
    """A small configuration of a family."""
    import transformers

    transformers.logging.set_verbosity_error()
    chosen = {**OPTIONS, **MORE}[family]
    kinds = {"layer_types": MIXED[:layers]} if "layer_types" in chosen else {}
    count = {"n_layer" if family in ("GPT2", "GPTJ", "Bloom") else "num_hidden_layers": layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, f"{family}Config")(**{**SIZES, **chosen, **kinds, **count, **options})


def language_model(family: str, layers: int = 5, **options: Any) -> nn.Module:
    """A small model of a family, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(configuration(family, layers, **options))
    return model.eval()


def padded(rows: int = 3, tokens: int = 12, side: str = "left") -> tuple[Tensor, Tensor]:
    """Token ids, and a mask that hides some of the first two rows; longer than every sliding window."""
    ids = torch.randint(3, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in ((0, 4), (1, 1)):
        mask[row, slice(0, count) if side == "left" else slice(tokens - count, tokens)] = 0
    return ids, mask
