"""A small Llama that learns to write Python from the standard library's sources, byte by byte, in any layout.

torchrun --standalone --nproc-per-node 2 examples/trainer_language.py                     # two stages
python examples/trainer_language.py                                                       # the same numbers
torchrun --standalone --nproc-per-node 2 examples/trainer_language.py schedule=zb-v bf16=true max_steps=50
"""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchdistpackage import PipelineTrainer, PipelineTrainingArguments, create_manual_causal_lm_splitter

LENGTH = 128  # bytes of a row
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
rows = [{"input_ids": row.long()} for row in text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)]


def model_init():
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=352, **layers))


how = {"output_dir": "run-language", "max_steps": 300, "per_device_train_batch_size": 16, "learning_rate": 3e-3}
how |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 1.0, "logging_steps": 20}
how |= {"eval_strategy": "steps", "eval_steps": 100, "save_steps": 100, "report_to": "tensorboard"}
trainer = PipelineTrainer(
    args=PipelineTrainingArguments.from_words(sys.argv[1:], **how),
    model_splitter=create_manual_causal_lm_splitter(),
    model_init=model_init,
    train_dataset=rows[: -len(rows) // 20],
    eval_dataset=rows[-len(rows) // 20 :],
)
trainer.train()
