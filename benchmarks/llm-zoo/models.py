"""The language models of the zoo: every class that transformers maps to causal language modelling, made tiny.

Nothing is downloaded. A class is built from its own configuration with small sizes (`_SIZES`: a number for each name
that any configuration has for its width, its heads, its experts, ...), so that a class that a later release of
transformers adds is usually built without a line here. What a class wants otherwise stands in `_FIXED`, `_MIXED` and
`_BY_DEPTH`.

Layers of different kinds alternate wherever a class has them (windowed and full attention, state space and attention,
dense and sparse MLPs), and windows and chunks are 4 tokens, so that a dozen tokens reach every kind of layer and leave
every window. Token 0 pads, 1 begins and 2 ends: random inputs are best drawn from 3 to 95 (`VOCABULARY`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CLASSES

__all__ = ["DECODERS", "NOT_BUILT", "PIECES", "SAME_CLASS", "VOCABULARY", "build", "families"]

VOCABULARY = 96

# The decoder of an encoder-decoder model, or an encoder with a causal mask (`is_decoder=True`). Their cross-attention,
# if they have it, gets nothing to look at, so its parameters get no gradient.
_PIECES = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie
marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm
roc_bert roformer trocr whisper xlm-roberta xlm-roberta-xl xmod
"""

# Model types whose class is that of another one: left out, because it would be built twice.
SAME_CLASS: dict[str, str] = {
    "dots3_note": "dots3_note_text",
    "gpt-sw3": "gpt2",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}

_DRAFTER = "a drafter: attends to the keys and values of another model and has no use for input_ids"
NOT_BUILT: dict[str, str] = {
    "fuyu": "multimodal; text class is PersimmonForCausalLM (persimmon)",
    "gemma3": "multimodal; text class is Gemma3ForCausalLM (gemma3_text)",
    "gemma3n": "multimodal; text class is Gemma3nForCausalLM (gemma3n_text)",
    "gemma4": "multimodal; text class is Gemma4ForCausalLM (gemma4_text)",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified": "multimodal; text class is Gemma4UnifiedForCausalLM (gemma4_unified_text)",
    "gemma4_unified_assistant": _DRAFTER,
    "got_ocr2": "multimodal; text class is Qwen2ForCausalLM (qwen2)",
    "moss_transcribe_diarize": "multimodal; text class is Qwen3ForCausalLM (qwen3)",
}

PIECES: tuple[str, ...] = tuple(name for name in _PIECES.split() if name in _CLASSES)
DECODERS: tuple[str, ...] = tuple(
    name for name in _CLASSES if name not in PIECES and name not in SAME_CLASS and name not in NOT_BUILT
)

# A value and the fields that get it, whichever of them a configuration has.
_SIZES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size unpadded_vocab_size"),
    (
        64,
        """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions context_length
        original_max_position_embeddings
        intermediate_size ffn_dim d_inner dff n_inner dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size
        dense_intermediate_size prefix_dense_intermediate_size intermediate_size_mlp feed_forward_size mamba_d_ssm
        """,
    ),
    (
        32,
        """
        hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size embedding_dim input_embedding_size
        output_embedding_size attention_hidden_size dim_model_base lru_width
        moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
        """,
    ),
    (
        16,
        """
        q_lora_rank kv_lora_rank o_lora_rank laurel_rank hidden_size_per_layer_input router_hidden_size adapter_rank
        rel_extent
        """,
    ),
    (
        8,  # heads of an index: with 4, its scores behind a ReLU are often all 0, and top-k chooses among equals
        """
        head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim index_head_dim indexer_head_dim d_head dim_head
        kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim swa_head_dim attention_head_size
        mamba_d_state state_size ssm_state_size mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim
        index_n_heads indexer_n_heads
        """,
    ),
    (
        4,
        """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads
        num_experts num_local_experts n_routed_experts moe_num_experts
        sliding_window sliding_window_size window_size attention_window_size attention_chunk_size local_attention
        keep_window_size mamba_chunk_size chunk_size block_size index_topk rotary_dim time_step_rank mamba_dt_rank
        """,
    ),
    (
        2,
        """
        num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok moe_topk moe_k top_k_experts n_group n_groups mamba_n_groups mamba_ngroups
        attn_layer_period expert_layer_period eos_token_id
        """,
    ),
    (
        1,
        """
        topk_group first_k_dense_replace num_dense_layers moe_layer_start_index max_window_layers attn_layer_offset
        expert_layer_offset n_shared_experts num_shared_experts moe_num_shared_experts bos_token_id
        """,
    ),
    (0, "pad_token_id num_mtp_layers num_nextn_predict_layers"),
    (
        0.0,
        """
        attention_dropout attention_probs_dropout_prob attn_pdrop embd_pdrop emb_pdrop resid_pdrop dropout dropout_p
        activation_dropout hidden_dropout hidden_dropout_prob classifier_dropout resid_dropout embed_dropout
        residual_dropout embedding_dropout mlp_dropout layerdrop decoder_layerdrop encoder_layerdrop
        lsh_attention_probs_dropout_prob local_attention_probs_dropout_prob router_jitter_noise
        """,
    ),
    # About 1 / sqrt(32). With the usual 0.02, attention over so few numbers would be uniform, whatever the mask.
    (0.2, "initializer_range init_std embed_init_std initializer_factor"),
    (1.0, "logit_scale logits_mup_width_multiplier"),
    (True, "use_sliding_window is_decoder"),
)
_DEPTHS = """
num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_decoder_layers
num_encoder_layers
"""
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")

_BLT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}  # of a model that also sees or hears
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# What a class wants otherwise, whatever its number of layers.
_FIXED: dict[str, dict[str, Any]] = {
    # Its default has no rotary embedding for its own layers.
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # How many tokens become one; the default is up to 128, more than there are.
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma4_text": {"enable_moe_block": True, "global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "git": {"vision_config": {**_TOWER, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}},
    "inkling2_text": {"n_layers_per_attn_res_block": 2, "log_scaling_n_floor": 4},
    "lfm2": {"block_multiple_of": 8},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},  # x head_dim = twice hidden_size
    "minimax_m3_vl_text": {"index_block_size": 4, "index_topk_blocks": 1, "index_n_heads": 2},
    "moshi": {"sliding_window": 64},  # its cache forgets what is outside the window, its mask does not
    "musicgen": {"num_codebooks": 1},  # so that input_ids are (batch, tokens)
    "musicgen_melody": {"num_codebooks": 1},
    "phi4_multimodal": {
        "vision_config": {**_TOWER, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28, "patch_size": 14},
        "audio_config": {
            **_TOWER,
            "num_blocks": 1,
            "input_size": 16,
            "nemo_conv_channels": 8,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
        },
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention"), "w_init_variance_scale": 1.0},
    # Axial positions demand that a training sequence has one exact length; hashes are drawn from a fixed seed.
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "whisper": {"num_mel_bins": 4},
    "xlm": {"causal": True},
    # Its cache is written in place, which backward does not forgive. Its states are as wide as a multiple of 64.
    "xlstm": {
        "use_cache": False,
        "hidden_size": 64,
        "embedding_dim": 64,
        "qk_dim_factor": 1.0,
        "ffn_round_up_to_multiple_of": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64},  # twice hidden_size
    "zaya": {"num_experts_per_tok": 1},  # it takes no other number
}

# Kinds of layers that a class knows but its default configuration does not use: they take turns.
_WINDOWED: dict[str, tuple[str, ...]] = {"layer_types": ("full_attention", "sliding_attention")}
_MIXED: dict[str, dict[str, tuple[str, ...]]] = {
    "cohere_compass_text": _WINDOWED,
    "dots1": _WINDOWED,
    "glm_moe_dsa": {"indexer_types": ("full", "shared")},
    "granitemoehybrid": {"layer_types": ("linear_attention", "full_attention")},
    "hy_v4": {"indexer_types": ("full", "shared")},
    "inkling_text": {"mlp_layer_types": ("dense", "sparse")},
    "laguna": _WINDOWED,
    "lfm2": {"layer_types": ("conv", "full_attention")},
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    "mellum": _WINDOWED,
    "minimax_m3_vl_text": {
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": ("dense", "sparse"),
    },
    "ministral": _WINDOWED,
    "nemotron_h": {"layers_block_type": ("linear_attention", "full_attention", "moe", "mlp")},
    "qwen2": _WINDOWED,
    "qwen2_moe": _WINDOWED,
    "qwen3": _WINDOWED,
    "reformer": {"attn_layers": ("local", "lsh")},
    "smollm3": _WINDOWED,
    "zaya": {"layer_types": ("hybrid", "hybrid_sliding")},
}


def _in_turn(kinds: Iterable[str], num_layers: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(kinds), num_layers))


def _blt(num_layers: int) -> dict[str, Any]:
    """Bytes -> patches -> bytes: four models in one. The depth is that of the last; the cache asks for it by name."""
    return {
        "patcher_config": {**_BLT, "num_hidden_layers": 1},
        "encoder_config": {**_BLT, "num_hidden_layers": 1, "hidden_size_global": 64},
        "global_config": {**_BLT, "num_hidden_layers": 2, "hidden_size": 64},
        "decoder_config": {**_BLT, "num_hidden_layers": num_layers, "hidden_size_global": 64},
        "num_hidden_layers": num_layers,
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 4,
        "patching_threshold": 4.1,  # nats: a byte that is less predictable than this begins a patch
    }


def _gemma4(num_layers: int) -> dict[str, Any]:
    """The last layers reuse keys and values of earlier ones; the very last one must see everything."""
    kinds = _in_turn(("full_attention", "sliding_attention"), num_layers)
    return {"num_kv_shared_layers": _shared(num_layers), "layer_types": kinds[:: 1 if num_layers % 2 else -1]}


def _gemma3n(num_layers: int) -> dict[str, Any]:
    return {
        "num_kv_shared_layers": _shared(num_layers),
        "activation_sparsity_pattern": [0.5] + [0.0] * (num_layers - 1),
    }


def _shared(num_layers: int) -> int:
    """How many layers can reuse keys and values: before them there has to be one of each of two kinds."""
    return max(0, min(2, num_layers - 2))


# What a class wants that depends on its number of layers.
_BY_DEPTH: dict[str, Callable[[int], dict[str, Any]]] = {
    "bamba": lambda num_layers: {"attn_layer_indices": list(range(1, num_layers, 2))},
    "blt": _blt,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
    "gpt_neo": lambda num_layers: {"attention_types": [[_in_turn(("global", "local"), num_layers), 1]]},
    "mllama": lambda num_layers: {"cross_attention_layers": [1]},  # skipped where there is no image
}


def families() -> list[str]:
    """The model types to try, each class once: first the decoder-only ones, then the pieces of other models.

    Example:
        >>> len(families()) == len(DECODERS) + len(PIECES)
        True
    """
    return [*DECODERS, *PIECES]


def build(name: str, num_layers: int = 5, **overrides: Any) -> nn.Module:
    """Makes a tiny model with random weights: float32, on the CPU, in eval mode, the same one each time.

    Args:
        name: One of `families()`.
        num_layers: Of its stack of layers (the last stack, if it has several); at least 2, and 4 for zamba, which
            shares the weights of its second layer with its fourth.
        overrides: Fields of its configuration that shall be otherwise.

    Example:
        >>> model = build("llama", num_layers=3)
        >>> model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 96])
    """
    model_class = getattr(transformers, _CLASSES[name])
    config = model_class.config_class(**(_options(name, model_class.config_class, num_layers) | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = model_class(config).float().eval()
        _stir(model)
    return model


def _options(name: str, config_class: type, num_layers: int) -> dict[str, Any]:
    """What the configuration of a class is made of."""
    sizes = {field: value for value, fields in _SIZES for field in fields.split()}
    sizes |= dict.fromkeys(_DEPTHS.split(), num_layers)
    default = config_class()
    for field in _KINDS:
        if kinds := getattr(default, field, None):
            sizes[field] = _in_turn(dict.fromkeys(kinds), num_layers)
    known = inspect.signature(config_class).parameters
    if "kv_lora_rank" in known:  # latent attention: what is cached is the latent, keys are as many as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return {
        **{field: value for field, value in sizes.items() if field in known},
        **{field: _in_turn(kinds, num_layers) for field, kinds in _MIXED.get(name, {}).items()},
        **_FIXED.get(name, {}),
        **(_BY_DEPTH[name](num_layers) if name in _BY_DEPTH else {}),
    }


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Makes what starts as a constant slightly random: a bias of zeros or a norm of ones hides that it got lost."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.state_dict().items():
        if name in parameters:
            continue
        if name.endswith("tid2eid"):  # the table that says which token goes to which experts
            buffer.copy_(torch.rand(*buffer.shape[:-1], 4).argsort(-1)[..., : buffer.shape[-1]])
        elif buffer.is_floating_point() and ((buffer == 0).all() or (buffer == 1).all()):
            buffer.add_(torch.randn_like(buffer), alpha=0.1)
