"""A language model writes, split over three processes: the one in the middle never sees a token.

    torchrun --standalone --nproc-per-node 3 examples/split_and_generate.py              # under a minute on two cores
    torchrun --standalone --nproc-per-node 3 examples/split_and_generate.py --check      # equal to the whole model?
    torchrun --standalone --nproc-per-node 3 examples/split_and_generate.py --model DIR --at 4,20 --prompt "Once upon"
    torchrun --standalone --nproc-per-node 3 examples/split_and_generate.py --parts DIR --prompt "Once" --prompt "Then"

DIR of --model is a Hugging Face directory, of which each process reads its own layers. DIR of --parts has one file a
part, as `part.save_split_model(...)`, examples/split_training.py --save, or `torchdistpackage split` write them.
Without either, a small Llama first learns The Zen of Python by heart, and then goes on with the first words of a line.

Who sees what, for each token::

    client                            server                         client
    rank 0  Bottom                    rank 1  Trunk                  rank 2  Top
    embedding, layers 0..a-1          layers a..b-1                  layers b..n-1, norm, head
    its cache                         its cache                      its cache

    text -> ids --> hidden state ---> ............ hidden state ---> logits -> next id
                    attention mask    attention mask                               |
      ^                                                                            |
      +---------------------- next id, in a group of these two only ---------------+

The server learns how many tokens there are, where there is padding, and when to stop; not what a token is, nor what the
Top picked. (A hidden state is no secret code: a server that tries can learn much from it. What this shows is which
process is given what.)

Where all processes trust each other, `torchdistpackage.generate({rank: part}, ids, ...)` does the same with all options
of transformers' `generate`, such as beams; every rank then has the ids, and gets the text.

Needs transformers: pip install -e '.[hf]'. Nothing is downloaded.
"""

import argparse
import contextlib
import io
import time
from pathlib import Path

import torch
import torch.distributed as dist
from split_parties import (
    character_tokenizer,
    cut_in_three,
    load_tokenizer,
    model_directory,
    own_part,
    take_part,
    tell_all,
    together,
    two_numbers,
)
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, set_seed

from torchdistpackage import forward_backward

PROMPTS = ["Beautiful is", "Now is", "There should be"]


def get_args(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="a Hugging Face directory; default: a small model is made")
    p.add_argument("--at", type=two_numbers, metavar="A,B", help="first layer of Trunk and Top; default: thirds")
    p.add_argument("--parts", type=Path, help="a directory with bottom.safetensors, trunk.safetensors, top.safetensors")
    p.add_argument("--tokenizer", type=Path, help="its directory; default: that of --parts or --model")
    p.add_argument("--prompt", action="append", help="what a text begins with; several are one batch")
    p.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn")
    p.add_argument("--check", action="store_true", help="compare with the whole model of --model; exit 1 if different")
    args = p.parse_args(arguments)
    if args.tokens < 1:
        p.error(f"--tokens is {args.tokens}; it must be 1 or more")
    if args.temperature < 0:
        p.error(f"--temperature is {args.temperature:g}; it must be 0 or more")
    if args.check and args.temperature:
        p.error("--check compares the likeliest tokens: leave --temperature out")
    if args.check and args.parts and not args.model:
        p.error("--check needs the whole model, too: pass --model DIR")
    args.prompt = args.prompt or PROMPTS
    return args


# --- a small model ----------------------------------------------------------------------------------------------------


def zen():
    """The lines of The Zen of Python, which Python prints when it is imported for the first time."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        import this  # noqa: F401
    return [line for line in out.getvalue().splitlines() if line]


def make_model(directory, steps=150):
    """A Llama of 6 layers that knows the lines by heart, in a few seconds."""
    lines = zen()
    tokenizer = character_tokenizer(lines)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    set_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = AutoModelForCausalLM.from_config(config)
    rows = tokenizer([line + tokenizer.eos_token for line in lines], return_tensors="pt", padding=True)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"a small Llama has learnt {len(lines)} lines by heart: loss {loss:.3f}", flush=True)


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """This process's part with its cache, for one batch of prompts."""

    def __init__(self, party, part):
        self.party, self.part, self.cache, self.seen = party, part, None, 0

    def __call__(self, x):
        """What is new goes in, through this part's layers, and on."""
        entered, mask = x
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, self.seen :]  # padding takes no place
        self.seen = mask.shape[1]
        options = {"attention_mask": mask, "position_ids": places, "past_key_values": self.cache, "use_cache": True}
        output = self.part(entered, **options)
        if self.party.component == "top":
            self.cache = output.past_key_values
            return output.logits[:, -1]
        hidden, self.cache = output
        return hidden, mask


def pick(logits, args, generator):
    """The next token of each row, by the Top."""
    logits = logits.float().cpu()
    if not args.temperature:
        return logits.argmax(-1)
    return torch.multinomial((logits / args.temperature).softmax(-1), 1, generator=generator)[:, 0]


def write(args, party, part, rows, ends, pad):
    """Prompt and new tokens on the Bottom; None elsewhere.

    Args:
        rows: ids and attention mask of the prompts, padded on the left; the Bottom's, as it alone needs them.
        ends: Tokens that end a text.
        pad: Token that is put behind the end.
    """
    writer, generator = Writer(party, part), torch.Generator().manual_seed(args.seed)
    new, mask, ids, ended = None, None, None, None
    if party.component == "bottom":
        new, mask = rows["input_ids"], rows["attention_mask"]
        ids, ended = new, torch.zeros(len(new), dtype=torch.bool)
    for left in reversed(range(args.tokens)):
        own = [new.to(party.device), mask.to(party.device)] if party.component == "bottom" else None
        logits = forward_backward(fwd_fn=writer, inputs=own, forward_only=True)
        if party.component == "top":
            picked = pick(logits, args, generator)
            dist.send(picked, 0, group=party.client)
        if party.component == "bottom":
            picked = torch.empty(len(ids), dtype=torch.long)
            dist.recv(picked, 2, group=party.client)
            picked = picked.masked_fill(ended, pad)
            ended |= torch.isin(picked, torch.tensor(ends))
            new = picked[:, None]
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        if not left or tell_all(party.component == "bottom" and bool(ended.all())):
            return ids


def whole_text(directory, args, party, rows, ends, pad):
    """The same by transformers, in one process."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(party.device).eval()
    model.generation_config = GenerationConfig()  # the likeliest tokens, whatever the directory says
    rows = {name: rows[name].to(party.device) for name in ("input_ids", "attention_mask")}
    return model.generate(**rows, max_new_tokens=args.tokens, eos_token_id=ends or None, pad_token_id=pad).cpu()


def prepare(args, directory, config):
    """Tokenizer, and the prompts as numbers."""
    tokenizer = load_tokenizer(directory)
    rows = tokenizer(args.prompt, return_tensors="pt", padding=True, padding_side="left")
    if not rows["attention_mask"].any(-1).all():
        raise ValueError(f"--prompt: one of {args.prompt} has no token; begin with at least one")
    longest, most = rows["input_ids"].shape[1], getattr(config, "max_position_embeddings", None)
    if most is not None and longest + args.tokens > most:
        raise ValueError(
            f"--tokens {args.tokens} after a prompt of {longest} are more than the {most} positions of the model: "
            f"try --tokens {max(1, most - longest)}"
        )
    return tokenizer, rows


def main():
    args = get_args()
    party = take_part("split_and_generate.py")
    with model_directory(args.model or args.parts, make_model) as directory:
        at = None if args.parts else together(lambda: cut_in_three(args, directory))
        part = own_part(party, directory, at, args.parts)
        home, reads = args.tokenizer or args.parts or directory, party.component == "bottom"
        tokenizer, rows = together(lambda: prepare(args, home, part.config) if reads else (None, None))
        ends = part.config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = tokenizer.pad_token_id if reads else None
        began = time.perf_counter()
        ids = write(args, party, part, rows, ends, pad)
        seconds = time.perf_counter() - began
        same = True
        if reads:
            new = ids.shape[1] - rows["input_ids"].shape[1]
            for row in ids:
                print(f"  {tokenizer.decode(row, skip_special_tokens=True)}")
            print(f"{len(ids)} x {new} tokens in {seconds:.1f} s, {1000 * seconds / new:.0f} ms each", flush=True)
            if args.check:
                same = torch.equal(ids, whole_text(directory, args, party, rows, ends, pad))
                print(f"check: {'the same tokens as' if same else 'NOT the tokens of'} the whole model", flush=True)
        same = tell_all(same)
    dist.destroy_process_group()
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
