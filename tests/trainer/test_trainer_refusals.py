"""What a trainer refuses, and what it says then; no step is made before, and one process is enough."""

import logging
import tempfile

import pytest
import torch
from distributed_harness import run_distributed
from torch import nn
from torch.utils.data import IterableDataset

from torchdistpackage import (
    AutoPipeline,
    AutoPipelineConfig,
    PipelineTrainer,
    PipelineTrainingArguments,
    TrainerError,
    setup_distributed,
)
from torchdistpackage.topology import tpc
from torchdistpackage.trainer import ProgressCallback
from torchdistpackage.trainer.assembly import cut_for
from torchdistpackage.trainer.batches import Batch, BatchSource, read_batch

ROWS = [{"x": torch.full((4,), float(number)), "labels": number % 2} for number in range(8)]
CPU = torch.device("cpu")


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def arguments(**options):
    return PipelineTrainingArguments(
        **{"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, **options}
    )


def trainer(**options):
    given = {"args": arguments(), "model_init": net, "train_dataset": ROWS, **options}
    made = PipelineTrainer(**given)
    made.remove_callback(ProgressCallback)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"args": {"max_steps": 2}}, "args must be PipelineTrainingArguments, got dict"),
        ({"args": arguments()}, "give train_dataset=..., eval_dataset=..., or both"),
    ],
)
def test_arguments_and_data_are_needed(options, message):
    with pytest.raises(TrainerError, match=message):
        PipelineTrainer(model_init=net, **options)


@pytest.mark.parametrize(
    ("model", "model_init", "message"),
    [
        (None, None, "give either model_init=..., a function"),
        (net(), net, "give either model_init=..., a function"),
        (None, 3, "model_init must be a function that returns the model, got a int"),
        (net, None, "model must be a torch.nn.Module, got a function; a function goes to model_init"),
    ],
)
def test_one_model_is_needed(model, model_init, message):
    with pytest.raises(TrainerError, match=message):
        cut_for(arguments(), model=model, model_init=model_init, splitter=None, example=Batch(()), device=CPU, seed=0)


def test_only_tokens_are_their_own_labels():
    with pytest.raises(TrainerError, match=r"its inputs \(float32 \(2, 3\)\) are no tokens that could be"):
        read_batch({"x": torch.zeros(2, 3)}, default_labels=True)


def test_a_stream_has_no_length():
    source = BatchSource(Once(), batch_size=2, replica=0, replicas=1, seed=0, shuffle=False)
    assert source.batches_per_epoch is None
    with pytest.raises(TypeError, match="Once does not know its length"):
        len(source)


def test_options_belong_into_the_configuration():
    with pytest.raises(TypeError, match=r"pp_batch_size belong\(s\) into the AutoPipelineConfig"):
        AutoPipeline(AutoPipelineConfig(), pp_batch_size=4)


class Once(IterableDataset):
    """A stream that can be read once only."""

    def __init__(self):
        self.rows = iter(ROWS)

    def __iter__(self):
        return self.rows


class Twice(nn.Module):
    """Two outputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x), self.fc(x)


def sizes_that_do_not_fit(rank, world):
    for options, message in (
        ({"pipeline_parallel_size": 3}, "do not make 1 processes: start 3, or leave one"),
        ({"data_parallel_size": 8}, "do not make 1 processes: start 8, or leave one"),
    ):
        with pytest.raises(TrainerError, match=message):
            trainer(args=arguments(**options))
    tpc.setup_process_groups([("pipe", 1)])
    with pytest.raises(TrainerError, match="data_parallel_size=2, but the process groups that are set up have 1"):
        trainer(args=arguments(data_parallel_size=2))


def test_sizes_must_fit_the_processes():
    run_distributed(sizes_that_do_not_fit, 1)


def models_and_data_that_do_not_fit(rank, world):
    with pytest.raises(TrainerError, match=r"model_init must return a torch.nn.Module, it returned a list"):
        trainer(model_init=list)
    with pytest.raises(TrainerError, match="gradient_checkpointing=True, but Sequential has no"):
        trainer(args=arguments(gradient_checkpointing=True))
    with pytest.raises(TrainerError, match="there is no eval_dataset"):
        trainer().evaluate()
    ignored = [{**row, "labels": -100} for row in ROWS]
    with pytest.raises(TrainerError, match="the evaluation saw 8 rows in 1 batches, and no label in them counts"):
        trainer().evaluate(ignored)
    both = trainer(
        model_init=Twice,
        compute_loss_func=lambda output, labels: nn.functional.cross_entropy(output[0], labels),
        compute_metrics=lambda found: {},
    )
    with pytest.raises(TrainerError, match="compute_metrics needs a model and labels that are single tensors"):
        both.evaluate(ROWS)
    with pytest.raises(
        TrainerError, match=r"epoch \d has no batches: the data \(Once\) are empty, or can be read only"
    ):
        trainer(args=arguments(max_steps=9), train_dataset=Once()).train()


def test_models_and_data_must_fit():
    run_distributed(models_and_data_that_do_not_fit, 1)


def trained_twice(rank, world):
    told = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("torchdistpackage.trainer.training_loop").addHandler(handler)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(args=arguments(output_dir=folder))
        first, second = made.train(), made.train()
    return first.global_step, second.global_step, told


def test_a_finished_run_says_that_nothing_is_left():
    first, second, told = run_distributed(trained_twice, 1)[0]
    assert (first, second) == (2, 2)
    assert len(told) == 1
    assert told[0].startswith("2 of 2 steps are done: nothing is left to train")


def sharded_layers(rank, world):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("tensor", world)])
    with pytest.raises(TrainerError, match="the tensor groups have 2 ranks, and this trainer does not shard layers"):
        trainer()


def test_tensor_groups_are_for_loops_of_ones_own():
    run_distributed(sharded_layers, 2)
