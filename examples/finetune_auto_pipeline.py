"""Fine-tunes a Hugging Face language model with AutoPipeline: a device mesh, a loss, and three lines.

    torchrun --standalone --nproc-per-node 2 examples/finetune_auto_pipeline.py
    torchrun --standalone --nproc-per-node 4 examples/finetune_auto_pipeline.py --pp 2 --schedule interleaved1f1b
    torchrun --standalone --nproc-per-node 2 examples/finetune_auto_pipeline.py --model path/to/Llama-3.2-1B --steps 10

Without --model a small Llama is made on the spot and learns to count: every row of the data is a run of numbers, and at
the end the model goes on counting. With more ranks than --pp the others hold replicas, wrapped in
DistributedDataParallel by `parallelize_fn`. Writes the schedule as a picture (--picture schedule.png).
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from torchdistpackage import AutoPipeline, AutoPipelineConfig, save_causal_lm, setup_distributed

VOCABULARY = 64


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a directory that from_pretrained loads; a small Llama when not given")
    parser.add_argument("--pp", type=int, help="ranks of a pipeline; all when not given")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--microbatch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--picture", help="where to draw the schedule; needs matplotlib")
    parser.add_argument("--save", help="a directory for the tuned model")
    return parser.parse_args()


def make_model(directory: str | None) -> nn.Module:
    set_seed(0)  # the same weights on every rank
    if directory:
        return AutoModelForCausalLM.from_pretrained(directory)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    return AutoModelForCausalLM.from_config(config)


def counting(rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Runs of numbers, (rows, tokens): each begins anywhere and goes round."""
    begin = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    return (begin + torch.arange(tokens)) % VOCABULARY


def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float().view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-100)


def replicate(part: nn.Module, world_mesh: object, moe_mesh: object, **axes: object) -> nn.Module | None:
    """One replica needs no wrapper."""
    group = world_mesh["dp"].get_group()
    return DistributedDataParallel(part, process_group=group) if dist.get_world_size(group) > 1 else None


def main() -> None:
    args = options()
    setup_distributed()
    world = dist.get_world_size()
    pp = args.pp or world
    if world % pp:
        raise SystemExit(f"{world} ranks are no whole number of pipelines of {pp}; pass --pp a divisor of {world}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world_mesh = init_device_mesh(device, (world // pp, pp), mesh_dim_names=("dp", "pp"))

    config = AutoPipelineConfig(
        world_mesh=world_mesh,
        pp_schedule=args.schedule,
        pp_microbatch_size=args.microbatch_size,
        pp_batch_size=args.batch_size,
        scale_grads_in_schedule=True,  # the mean over the batch, not the sum over micro-batches
    )
    ap = AutoPipeline(config).build(make_model(args.model), loss_fn=loss_fn, parallelize_fn=replicate)
    optimizer = torch.optim.AdamW(ap.parameters(), lr=args.lr)

    if dist.get_rank() == 0:
        print(ap.debug_summary())
        if args.picture:
            ap.visualize_current_schedule(args.picture)
    print(ap.pretty_print_stages(max_modules_per_stage=4), flush=True)

    generator = torch.Generator().manual_seed(1 + world_mesh["dp"].get_local_rank())  # each replica its own rows
    for step in range(1, args.steps + 1):
        rows = counting(args.batch_size, 24, generator).to(ap.device)
        loss = ap.step(rows[:, :-1], target=rows[:, 1:])
        norm = ap.clip_grad_norm(max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ap.info.has_last_stage and (step % 10 == 0 or step == 1):
            print(f"step {step:4d}   loss {loss:.4f}   gradient norm {norm:.3f}", flush=True)

    prompt = counting(2, 6, torch.Generator().manual_seed(0)).to(ap.device)
    for part in ap.parts:
        part.eval()
    text = ap.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    if dist.get_rank() == 0:
        for row in text.tolist():
            print("counts", *row[:6], "->", *row[6:])
    if args.save:
        save_causal_lm({stage.stage_index: stage.submod for stage in ap.info.stages}, args.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
