"""A small language model learns to write Python, character by character, from the sources of the standard library.

    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --pp 2      # under two minutes on two CPU cores
    python examples/train_gpt.py --pp 1                                       # one process: the same losses
    python examples/train_gpt.py --plain                                      # a plain loop, without the library
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --pp 2 --arch gpt2 --schedule zb-v
    torchrun --standalone --nproc-per-node 4 examples/train_gpt.py --pp 2      # 2 replicas x 2 stages
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --pp 2 --save run     # a Hugging Face directory
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py --pp 2 --model run    # goes on with it, or with
                                                                  # any other one: its tokenizer is used, if it has one

Needs transformers: pip install -e '.[hf]'. Nothing is downloaded. The first line that is printed is the unigram entropy
of the text, the loss of someone who knows how frequent each letter is and nothing else.
"""

import argparse
import itertools
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from torchdistpackage import (
    DDP,
    clip_grad_norm_,
    forward_backward,
    generate,
    load_causal_lm,
    partition_causal_lm,
    save_causal_lm,
    setup_distributed,
    tpc,
)
from torchdistpackage.schedule import names


def get_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parallel = p.add_argument_group("parallelism")
    parallel.add_argument("--pp", type=int, help="ranks of a pipeline (default: all); processes / PP are replicas")
    parallel.add_argument("--schedule", default="1f1b", help=f"auto, auto-v, {', '.join(names())}, or a CSV file")
    parallel.add_argument("--microbatches", type=int, default=4)
    parallel.add_argument("--plain", action="store_true", help="one process, without the library, to compare with")
    model = p.add_argument_group("model")
    model.add_argument("--arch", choices=["gpt2", "llama"], default="llama")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--width", type=int, default=96, help="a multiple of 32, the width of a head")
    model.add_argument("--model", type=Path, help="fine-tune the model of this directory instead of a new one")
    model.add_argument("--save", type=Path, help="write what was learnt to this directory, for from_pretrained")
    train = p.add_argument_group("training")
    train.add_argument("--steps", type=int, default=600)
    train.add_argument("--batch-size", type=int, default=16, help="rows of a step, over all replicas")
    train.add_argument("--context", type=int, default=128, help="tokens of a row")
    train.add_argument("--lr", type=float, help="its peak; default: 4e-3, with --model 1e-4")
    train.add_argument("--seed", type=int, default=0, help="of weights, batches and the sample")
    report = p.add_argument_group("report")
    report.add_argument("--every", type=int, help="a line of the table after so many steps; default: ten lines")
    report.add_argument("--prompt", default="class ", help="what the sample begins with")
    report.add_argument("--tokens", type=int, default=400, help="how many the sample has; 0 for none")
    report.add_argument("--plot", help="draw the losses to this file (.png, .svg, ...)")
    return p.parse_args(arguments)


def check(args, processes):
    """Completes the options; ends the run where they do not fit."""
    args.pp = args.pp or processes
    args.lr = args.lr or (1e-4 if args.model else 4e-3)
    args.every = args.every or max(1, args.steps // 10)
    least = dict.fromkeys(("pp", "microbatches", "layers", "width", "steps", "batch_size", "every"), 1)
    for name, value in {**least, "context": 2, "tokens": 0}.items():
        if getattr(args, name) < value:
            raise SystemExit(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {value} or more")
    if processes % args.pp:
        raise SystemExit(
            f"--pp {args.pp} needs {args.pp} processes or a multiple; {processes} run here. Start it by\n"
            f"    torchrun --standalone --nproc-per-node {args.pp} examples/train_gpt.py --pp {args.pp}"
        )
    if args.plain and os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit(f"--plain is a loop in one process, not {os.environ['WORLD_SIZE']}: start it by python")
    if args.batch_size % (processes // args.pp):
        raise SystemExit(f"--batch-size {args.batch_size} is not divisible by the {processes // args.pp} replicas")
    if args.width % 32:
        raise SystemExit(f"--width {args.width} is no multiple of 32: try {max(32, round(args.width / 32) * 32)}")
    if args.save and args.save.exists() and not args.save.is_dir():
        raise SystemExit(f"--save {args.save} is a file; give a directory")
    if args.model and not (args.model / "config.json").is_file():
        raise SystemExit(f"--model {args.model} has no config.json; give a directory that --save has written")


# --- the text ---------------------------------------------------------------------------------------------------------


def read_sources():
    """Training and held-out text, lists of files: the modules a to m, which depend on the version of Python only."""
    folder = sysconfig.get_path("stdlib")
    paths = sorted(Path(folder).glob("[a-m]*.py"))
    if len(paths) < 20:
        raise SystemExit(f"{folder} has only {len(paths)} sources: use a Python that comes with its .py files")
    texts = [path.read_bytes().decode("ascii", "ignore").replace("\r", "") for path in paths]
    return [text for number, text in enumerate(texts) if number % 10 < 9], texts[9::10]


def make_tokenizer(args, texts):
    """The model's own if it has one, else a token for every character that the texts have."""
    if args.model and any(path.name.startswith(("tokenizer", "vocab", "spiece")) for path in args.model.iterdir()):
        return AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    vocabulary = {character: number for number, character in enumerate(sorted({*"".join(texts)}))}
    if not args.prompt or {*args.prompt} - {*vocabulary}:
        raise SystemExit(f"--prompt {args.prompt!r} must be made of the text's characters, {''.join(vocabulary)!r}")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))  # nothing is merged: a token is a character
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def encode(tokenizer, texts):
    return torch.tensor([token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)])


def batches(tokens, args, seed):
    """Endless (inputs, targets), this replica's rows of the batch; targets are the inputs' successors."""
    generator = torch.Generator().manual_seed(seed)
    replica, replicas = (tpc.get_dp_rank(), tpc.get_dp_size()) if dist.is_initialized() else (0, 1)
    first, behind = (args.batch_size * index // replicas for index in (replica, replica + 1))
    while True:
        starts = torch.randint(len(tokens) - args.context, (args.batch_size, 1), generator=generator)
        found = tokens[starts[first:behind] + torch.arange(args.context + 1)]
        yield found[:, :-1], found[:, 1:]


# --- the model, with and without the library --------------------------------------------------------------------------


def make_config(args, tokenizer, tokens, held_out):
    """What the model is, checked against the text."""
    if args.context >= len(held_out):
        raise SystemExit(f"--context {args.context} is longer than the held-out text, {len(held_out)} tokens")
    if not args.model:
        options = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
        heads = args.width // 32
        if args.arch == "gpt2":
            sizes = {"n_positions": args.context, "n_embd": args.width, "n_layer": args.layers, "n_head": heads}
            return GPT2Config(**sizes, **options, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        sizes = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": heads}
        inner = args.width * 8 // 3  # with its three matrices, as large as the usual two of 4 x width
        return LlamaConfig(**sizes, **options, intermediate_size=inner, max_position_embeddings=args.context)
    config = AutoConfig.from_pretrained(args.model)
    if (kinds := 1 + int(max(tokens.max(), held_out.max()))) > config.vocab_size:
        raise SystemExit(
            f"--model {args.model} has a vocabulary of {config.vocab_size}, but the text has {kinds} kinds of tokens; "
            "put the tokenizer of the model into that directory"
        )
    if args.context > getattr(config, "max_position_embeddings", args.context):
        raise SystemExit(
            f"--context {args.context} is longer than the {config.max_position_embeddings} positions of --model "
            f"{args.model}: try --context {config.max_position_embeddings}"
        )
    return config


def cross_entropy(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Pipelined:
    """The model in stages, some on each rank. Every method is called on all ranks."""

    def __init__(self, args, config, device):
        self.args, self.device = args, device
        if args.model:  # each rank reads its own stages only; they come in evaluation mode, without dropout
            self.parts = load_causal_lm(args.model, args.schedule, dtype=torch.float32, device=device)
        else:  # every rank builds the same model and keeps its own part
            torch.manual_seed(args.seed)
            self.parts = partition_causal_lm(AutoModelForCausalLM.from_config(config), args.schedule)
        self.parts = {index: part.to(device) for index, part in self.parts.items()}
        self.parameters = list(nn.ModuleList(self.parts.values()).parameters())
        self.last = args.pp * len(self.parts) - 1  # index of the stage that has the loss
        self.reports = self.last in self.parts and tpc.is_first_in_data_group()
        self.functions = [self.function(index, DDP(part)) for index, part in self.parts.items()]
        self.options = {"num_microbatches": args.microbatches, "schedule": args.schedule}

    def function(self, index, part):
        return part if index < self.last else lambda x: cross_entropy(part(x[0]), x[1])

    def loss(self, x, y, optimizer=None):
        """Of one batch, on the ranks of the last stage; with an optimizer gradients, too."""
        own = [[*([x] if stage == 0 else []), *([y] if stage == self.last else [])] or None for stage in self.parts]
        evaluates = optimizer is None
        loss = forward_backward(optimizer, self.functions, None, own, forward_only=evaluates, **self.options)
        if loss is not None and tpc.get_dp_size() > 1:
            dist.all_reduce(loss, group=tpc.get_group("data"))
            loss /= tpc.get_dp_size()
        return loss

    def clip(self, norm):
        clip_grad_norm_(self.parameters, norm)

    def generate(self, tokens, seed, **options):
        return generate(self.parts, tokens, schedule=self.args.schedule, seed=seed, **options)

    def save(self, directory):
        save_causal_lm(self.parts, directory)


class Plain:
    """The same without the library: what a training loop for one process looks like."""

    def __init__(self, args, config, device):
        self.args, self.device, self.reports = args, device, True
        torch.manual_seed(args.seed)
        auto = AutoModelForCausalLM
        model = auto.from_pretrained(args.model, dtype=torch.float32) if args.model else auto.from_config(config)
        self.model = model.to(device)
        self.parameters = list(model.parameters())

    def loss(self, x, y, optimizer=None):
        if optimizer is not None:
            optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        with torch.set_grad_enabled(optimizer is not None):
            count = min(self.args.microbatches, len(x))
            for inputs, targets in zip(x.tensor_split(count), y.tensor_split(count), strict=True):
                logits = self.model(inputs, use_cache=False).logits
                share = cross_entropy(logits, targets) * (len(inputs) / len(x))
                if optimizer is not None:
                    share.backward()
                total += share.detach()
        return total

    def clip(self, norm):
        """torch's clip_grad_norm_, with norms added in float64 as the library does: the same bits to the last step."""
        norms = torch.stack([p.grad.norm() for p in self.parameters]).double()
        nn.utils.clip_grads_with_norm_(self.parameters, norm, norms.square().sum().sqrt().float())

    def generate(self, tokens, seed, **options):
        torch.manual_seed(seed)
        return self.model.generate(tokens, **options)

    def save(self, directory):
        self.model.save_pretrained(directory)


# --- training ---------------------------------------------------------------------------------------------------------


def make_optimizer(args, parameters):
    """AdamW; biases and norms are not decayed."""
    decayed, kept = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=args.lr, betas=(0.9, 0.95))


def learning_rate(args, step):
    """Linear warm-up over a twentieth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup))))


def evaluate(args, model, tokens, count=8):
    """Mean loss of always the same held-out batches."""
    held_out = batches(tokens, args, seed=args.seed + 1)
    losses = [model.loss(*(each.to(model.device) for each in next(held_out))) for _ in range(count)]
    return sum(losses).item() / count if model.reports else None


def train(args, model, tokens, held_out):
    """All steps; returns the loss of each, and {number of steps: held-out loss}, on the rank that reports."""
    optimizer, source = make_optimizer(args, model.parameters), batches(tokens, args, args.seed)
    losses, curve, seconds, since = [], {0: evaluate(args, model, held_out)}, 0.0, 0
    if model.reports:
        print(f"{'step':>6}{'train loss':>12}{'val loss':>12}{'lr':>10}{'tokens/s':>10}")
        print(f"{0:6}{'':12}{curve[0]:12.6f}", flush=True)
    for step in range(args.steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        loss = model.loss(*(each.to(model.device) for each in next(source)), optimizer)
        model.clip(1.0)
        optimizer.step()
        losses.append(loss.item() if model.reports else None)
        if model.reports and not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step + 1}: try --lr {args.lr / 4:g}, not {args.lr:g}")
        seconds += time.perf_counter() - began
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            curve[step + 1] = evaluate(args, model, held_out)
            if model.reports:
                mean, rate = sum(losses[since:]) / (step + 1 - since), learning_rate(args, step)
                speed = (step + 1 - since) * args.batch_size * args.context / seconds
                print(f"{step + 1:6}{mean:12.6f}{curve[step + 1]:12.6f}{rate:10.1e}{speed:10.0f}", flush=True)
            seconds, since = 0.0, step + 1
    return losses, curve


def write(args, model, tokenizer):
    """A sample, on every rank; past the context the model sees the last half of it, as far as it has learnt."""
    tokens = encode(tokenizer, [args.prompt])[None].to(model.device)
    wanted = tokens.shape[1] + args.tokens
    while tokens.shape[1] < wanted:
        seen = tokens[:, -max(1, args.context // 2) :]
        count = min(args.context - seen.shape[1], wanted - tokens.shape[1])
        options = {"do_sample": True, "temperature": 0.7, "attention_mask": torch.ones_like(seen), "pad_token_id": 0}
        longer = model.generate(seen, args.seed + tokens.shape[1], max_new_tokens=count, **options)
        tokens = torch.cat([tokens, longer[:, seen.shape[1] :]], dim=1)
        if longer.shape[1] < seen.shape[1] + count:
            break  # the model has said that it is done
    return tokenizer.decode(tokens[0])


# --- the report -------------------------------------------------------------------------------------------------------


def draw(losses, entropy, width=72, height=12):
    """The losses as lines of text: mean and axis; dashes are the unigram entropy."""
    width = min(width, len(losses))
    edges = [len(losses) * column // width for column in range(width + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    high, low = max(*means, entropy), min(*means, entropy)
    rows = [round((high - value) / (high - low or 1) * (height - 1)) for value in means]
    level = round((high - entropy) / (high - low or 1) * (height - 1))
    for row in range(height):
        line = "".join("*" if at == row else "-" if row == level else " " for at in rows)
        print(f"{high - (high - low) * row / (height - 1):8.2f} |{line}")
    print(f"{'':8} 1{len(losses):>{width}}")


def plot(args, losses, curve, entropy):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    axes.plot(range(1, len(losses) + 1), losses, lw=0.8, label="train")
    axes.plot(list(curve), list(curve.values()), "o-", label="held out")
    axes.axhline(entropy, color="grey", ls="--", label="unigram entropy")
    axes.legend()
    figure.savefig(args.plot)


def main():
    args = get_args()
    torch.set_num_threads(1)  # on CPU the same number of threads gives the same bits
    if args.plain:
        check(args, 1)
    else:
        _, processes, *_ = setup_distributed()
        check(args, processes)
        tpc.setup_process_groups([("data", processes // args.pp), ("pipe", args.pp)])
    logging.disable_progress_bar()  # of the files that each rank reads and writes
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    texts, held_out = read_sources()
    tokenizer = make_tokenizer(args, [*texts, *held_out])
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, held_out)
    model = (Plain if args.plain else Pipelined)(args, make_config(args, tokenizer, tokens, held_out), device)
    frequencies = tokens.bincount()[tokens.unique()].double() / len(tokens)
    entropy = -(frequencies * frequencies.log()).sum().item()
    if model.reports:
        print(f"unigram entropy {entropy:.4f} nats; {len(tokens):,} tokens of {len(frequencies)} kinds", flush=True)
    losses, curve = train(args, model, tokens, held_out)
    if model.reports:
        draw(losses, entropy)
        if args.plot:
            plot(args, losses, curve, entropy)
    if args.save:
        model.save(args.save)
        if model.reports:
            tokenizer.save_pretrained(args.save)
    if args.tokens:
        sample = write(args, model, tokenizer)
        if model.reports:
            print(f"\n{sample}")
    if not args.plain:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
