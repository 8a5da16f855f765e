"""A vision transformer of timm on the handwritten digits, in any layout, without a loop of one's own.

torchrun --standalone --nproc-per-node 2 examples/trainer_vision.py                  # two stages; 95 % in minutes
python examples/trainer_vision.py                                                    # the same numbers, one process
torchrun --standalone --nproc-per-node 2 examples/trainer_vision.py schedule=zb-v    # any argument
"""

import sys

import timm
from digits import NUM_CLASSES, Digits
from torch import nn

from torchdistpackage import PipelineTrainer, PipelineTrainingArguments


def model_init():
    size = {"img_size": 32, "patch_size": 8, "depth": 4}
    return timm.create_model("deit_tiny_patch16_224", num_classes=NUM_CLASSES, **size)


def accuracy(found):
    return {"accuracy": (found.predictions.argmax(axis=1) == found.label_ids).mean()}


how = {"output_dir": "run-vision", "num_train_epochs": 25, "per_device_train_batch_size": 32, "learning_rate": 5e-4}
how |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.05, "max_grad_norm": 1.0}
how |= {"eval_strategy": "epoch", "logging_steps": 45, "save_strategy": "epoch", "report_to": "tensorboard"}
trainer = PipelineTrainer(
    args=PipelineTrainingArguments.from_words(sys.argv[1:], **how),
    model_init=model_init,
    train_dataset=Digits(train=True, size=32, augment=True),
    eval_dataset=Digits(train=False, size=32),
    compute_loss_func=nn.CrossEntropyLoss(label_smoothing=0.1),
    compute_metrics=accuracy,
)
trainer.train()
