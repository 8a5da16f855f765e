"""A language model is fine-tuned, split over three processes: Bottom has the ids, Top the labels, the Trunk neither.

    torchrun --standalone --nproc-per-node 3 examples/split_training.py            # about half a minute on two cores
    torchrun --standalone --nproc-per-node 3 examples/split_training.py --check    # the losses of a plain loop?
    torchrun --standalone --nproc-per-node 3 examples/split_training.py --schedule zb-h1 --microbatches 6
    torchrun --standalone --nproc-per-node 3 examples/split_training.py --freeze trunk       # the client tunes its ends
    torchrun --standalone --nproc-per-node 3 examples/split_training.py --model DIR --at 4,20 --lr 1e-5
    torchrun --standalone --nproc-per-node 3 examples/split_training.py --save parts
    torchrun --standalone --nproc-per-node 3 examples/split_and_generate.py --parts parts --prompt "    def "

Without --model the model is a new GPT-2 of 6 layers, whose head is its embedding: Bottom and Top have a copy each, and
the library adds up the gradients of both. The text is lines of Python, of the standard library's sources.

Who sees what, for each micro-batch::

    client                            server                         client
    rank 0  Bottom                    rank 1  Trunk                  rank 2  Top
    embedding, layers 0..a-1          layers a..b-1                  layers b..n-1, norm, head

    ids  -> hidden state -----------> ............ hidden state ---> logits, labels -> loss
            attention mask            attention mask                                    |
        <-- gradient <--------------- ............ gradient <---------------------------+

Each process makes the optimizer of its own part, or none where the part is frozen: gradients pass through it all the
same. Clipping is by the norm of all three, which the processes add up.

Rows have lines of different lengths, so micro-batches have different numbers of tokens to predict. The loss of the
batch is the mean over its tokens, as in a plain loop: the Top weighs each micro-batch by its share of them.

Needs transformers: pip install -e '.[hf]'. Nothing is downloaded.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
from split_parties import (
    COMPONENTS,
    character_tokenizer,
    cut_in_three,
    everyones,
    load_tokenizer,
    model_directory,
    own_part,
    take_part,
    tell_all,
    together,
    two_numbers,
)
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, set_seed

from torchdistpackage import clip_grad_norm_, forward_backward
from torchdistpackage.schedule import describe, names
from torchdistpackage.split import ties_in

SCHEDULES = [name for name in names() if describe(name).chunks == 1]


def get_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="a Hugging Face directory; default: a new, small GPT-2")
    p.add_argument("--at", type=two_numbers, metavar="A,B", help="first layer of Trunk and Top; default: thirds")
    p.add_argument("--schedule", default="1f1b", choices=SCHEDULES)
    p.add_argument("--microbatches", type=int, default=4)
    p.add_argument("--batch-size", type=int, default=18, help="rows of a step")
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--freeze", choices=COMPONENTS, help="the part that stays as it is")
    p.add_argument("--seed", type=int, default=0, help="of the new model and of the batches")
    p.add_argument("--save", type=Path, help="a directory; each process writes its own part to it")
    p.add_argument("--check", action="store_true", help="compare with a plain loop; exit 1 if different. No dropout")
    args = p.parse_args(arguments)
    for name in ("microbatches", "batch_size", "steps"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be 1 or more")
    return args


# --- text and model ---------------------------------------------------------------------------------------------------


def read_lines():
    """Lines of 8 to 60 characters, of the modules a to c."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py"))
    texts = [path.read_bytes().decode("ascii", "ignore") for path in paths]
    lines = [line.rstrip() for text in texts for line in text.splitlines()]
    return [line for line in lines if 8 <= len(line) <= 60 and line.isprintable()]


def make_model(directory, seed):
    """A new GPT-2, and its tokenizer: a token for each character."""
    tokenizer = character_tokenizer(read_lines())
    set_seed(seed)
    sizes = {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 128, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def batches(args, tokenizer):
    """For each step ids, attention mask and labels: the rows padded on the right, and -100 there."""
    lines, generator = read_lines(), torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        chosen = torch.randint(len(lines), (args.batch_size,), generator=generator)
        texts = [lines[number] + (tokenizer.eos_token or "") for number in chosen]
        rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = rows["input_ids"], rows["attention_mask"]
        yield ids, mask, ids.masked_fill(mask == 0, -100)


def predicted(labels):
    """How many tokens are predicted: each from those before it."""
    return (labels[:, 1:] != -100).sum()


# --- training ---------------------------------------------------------------------------------------------------------


def freeze(part, component, frozen):
    """What is not to change wants no gradient. A weight that both ends share is one: it is frozen with either."""
    if component == frozen:
        part.requires_grad_(False)
    elif {component, frozen} == {"bottom", "top"}:
        for tie in ties_in(part).values():
            tie.parameter.requires_grad_(False)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
            module.attention_dropout = 0.0


def make_optimizer(parameters, lr):
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(wanted, lr=lr) if wanted else None


def train(args, party, part, tokenizer):
    """Losses and norms of all steps; the losses on the Top."""
    optimizer, losses, norms = make_optimizer(part.parameters(), args.lr), [], []
    source = batches(args, tokenizer) if party.is_client else None

    def forward(x):
        if party.component == "bottom":
            ids, mask = x
            return part(ids, attention_mask=mask), mask
        hidden, mask, *labels = x
        if party.component == "trunk":
            return part(hidden, attention_mask=mask), mask
        return part(hidden, attention_mask=mask, labels=labels[0]).loss * (predicted(labels[0]) / total)

    for step in range(args.steps):
        own, total = None, None
        if party.is_client:
            ids, mask, labels = (tensor.to(party.device) for tensor in next(source))
            own, total = ([ids, mask] if party.component == "bottom" else [labels]), predicted(labels)
        options = {"num_microbatches": args.microbatches, "schedule": args.schedule, "loss_reduction": "sum"}
        loss = forward_backward(optimizer, forward, None, own, **options)
        norms.append(clip_grad_norm_(part.parameters(), 1.0).item())
        if optimizer is not None:
            optimizer.step()
        if party.component == "top":
            losses.append(loss.item())
            if step == 0 or (step + 1) % max(1, args.steps // 8) == 0:
                print(f"{step + 1:6}{losses[-1]:12.6f}{norms[-1]:12.6f}", flush=True)
    return losses, norms


def train_plainly(args, party, directory, tokenizer, frozen):
    """The same without the library: the whole model in one process, over the same micro-batches."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(party.device).train()
    without_dropout(model)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer, losses, norms = make_optimizer(model.parameters(), args.lr), [], []
    for batch in batches(args, tokenizer):
        ids, mask, labels = (tensor.to(party.device) for tensor in batch)
        optimizer.zero_grad()
        loss = torch.zeros((), device=party.device)
        count = min(args.microbatches, len(ids))
        for x, seen, y in zip(*(tensor.tensor_split(count) for tensor in (ids, mask, labels)), strict=True):
            output = model(input_ids=x, attention_mask=seen, labels=y, use_cache=False)
            share = output.loss * (predicted(y) / predicted(labels))
            share.backward()
            loss += share.detach()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return losses, norms


def compare(found, expected, norm, expected_norm):
    """Whether losses are the plain loop's to 1e-6, and the first norm to 1e-5; says how near they are."""
    apart = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    bits = sum(a == b for a, b in zip(found, expected, strict=True))
    norms = abs(norm - expected_norm) / expected_norm
    print(
        f"check: {len(apart)} losses, {bits} of them the same bits as the plain loop's, the others at most "
        f"{max(apart):.1e} off; gradient norm of the first step {norm:.6f} and {expected_norm:.6f}",
        flush=True,
    )
    return max(apart) <= 1e-6 and norms <= 1e-5


def check(args, party, directory, tokenizer, part, losses, norms):
    """Whether the plain loop, which the Bottom's process runs, has the same numbers; they come from the Top."""
    sent = torch.tensor(losses or [0.0] * args.steps, dtype=torch.float64)
    still = [name for name, parameter in part.named_parameters() if not parameter.requires_grad]
    frozen, same = [name for each in everyones(still) for name in each], True
    if party.component == "top":
        dist.send(sent, 0, group=party.client)
    if party.component == "bottom":
        dist.recv(sent, 2, group=party.client)
        expected, plain_norms = train_plainly(args, party, directory, tokenizer, frozen)
        same = compare(sent.tolist(), expected, norms[0], plain_norms[0])
    return tell_all(same)


def save(args, party, part, tokenizer):
    together(lambda: part.save_split_model(args.save / f"{party.component}.safetensors"))
    if party.component == "bottom":
        tokenizer.save_pretrained(args.save)
        print(f"saved: --parts {args.save} of split_and_generate.py goes on with it", flush=True)


def main():
    args = get_args()
    party = take_part("split_training.py")
    with model_directory(args.model, lambda path: make_model(path, args.seed)) as directory:
        part = own_part(party, directory, together(lambda: cut_in_three(args, directory)))
        tokenizer = together(lambda: load_tokenizer(directory) if party.is_client else None)
        part.train()
        if args.check:
            without_dropout(part)
        if args.freeze:
            freeze(part, party.component, args.freeze)
        if party.component == "top":
            print(f"{'step':>6}{'loss':>12}{'norm':>12}", flush=True)
        began = time.perf_counter()
        losses, norms = train(args, party, part, tokenizer)
        seconds = time.perf_counter() - began
        if party.component == "top":
            print(f"{args.steps} steps in {seconds:.1f} s, {1000 * seconds / args.steps:.0f} ms each", flush=True)
        if args.save:
            save(args, party, part, tokenizer)
        same = True
        if args.check:
            same = check(args, party, directory, tokenizer, part, losses, norms)
    dist.destroy_process_group()
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
