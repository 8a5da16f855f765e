"""Memory and time of splitting a checkpoint on disk, beside loading the model and saving three files.

    python benchmarks/split-checkpoint/bench.py               # makes a checkpoint of 2 GB in a temporary directory
    python benchmarks/split-checkpoint/bench.py MODEL_DIR --at 6,16

Every way runs in a process of its own, which says at its end what it had resident at most (VmHWM: the high-water mark
that the kernel keeps for each program; it includes the pages of mapped files). Both ways write to the same disk, after
`sync`; the source is in the page cache for both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

AT = "6,16"
LAYERS, WIDTH, INNER, VOCABULARY, HEADS, KEYS = 22, 2048, 5632, 32000, 32, 4
SHARD = 900 << 20

ENDING = """
import atexit
def _tell():
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    print("VmHWM", status["VmHWM"].split()[0])
atexit.register(_tell)
"""
IMPORTS = "import torch, transformers\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
STRUCTURE = (
    IMPORTS
    + """
config = AutoConfig.from_pretrained({source!r})
with torch.device("meta"):
    AutoModelForCausalLM.from_config(config)
"""
)
SPLIT = """
import sys
from torchdistpackage.cli import main
sys.argv = ["torchdistpackage", "split", {source!r}, "--at", {at!r}, "--out", {out!r}]
main()
"""
LOAD = (
    IMPORTS
    + """
import pathlib, re
from safetensors.torch import save_file
model = AutoModelForCausalLM.from_pretrained({source!r}, dtype="auto")
first, second = map(int, {at!r}.split(","))
parts = {{"bottom": {{}}, "trunk": {{}}, "top": {{}}}}
for name, tensor in model.state_dict().items():
    layer = re.search(r"[.]([0-9]+)[.]", name)
    number = int(layer[1]) if layer else -1 if "embed" in name else second
    parts["bottom" if number < first else "trunk" if number < second else "top"][name] = tensor
pathlib.Path({out!r}).mkdir()
for name, tensors in parts.items():
    save_file(tensors, {out!r} + "/" + name + ".safetensors", metadata={{"format": "pt"}})
"""
)
WAYS = {"the structure alone, nothing written": STRUCTURE, "split on disk": SPLIT, "load all, save three files": LOAD}


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama model of 1.1 billion parameters."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    few = WIDTH * KEYS // HEADS
    sizes = {"self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (few, WIDTH), "self_attn.v_proj": (few, WIDTH)}
    sizes |= {"self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH)}
    sizes |= {"mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    for layer in range(LAYERS):
        found |= {f"model.layers.{layer}.{name}.weight": size for name, size in sizes.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def make(directory: Path) -> None:
    """Writes a checkpoint of 2 GB, tensor by tensor: random bytes, which are bfloat16 as well as any."""
    from torchdistpackage.split.decoder.safetensors_header import TensorEntry, make_header

    groups: list[dict[str, TensorEntry]] = [{}]
    for name, shape in shapes().items():
        count = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if sum(entry.num_bytes for entry in groups[-1].values()) + count > SHARD:
            groups.append({})
        groups[-1][name] = TensorEntry("BF16", shape, 0, count)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        header = make_header(group)
        with (directory / file).open("wb") as opened:
            opened.write(header.text)
            for entry in header.tensors.values():
                for begin in range(0, entry.num_bytes, 1 << 24):
                    opened.write(os.urandom(min(1 << 24, entry.num_bytes - begin)))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config |= {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))


def measured(code: str) -> tuple[float, float]:
    """Peak in MB and seconds of a program, in a process of its own."""
    os.sync()
    begin = time.perf_counter()
    made = subprocess.run([sys.executable, "-c", ENDING + code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if made.returncode:
        raise SystemExit(made.stderr)
    return int(made.stdout.rpartition("VmHWM")[2]) / 2**10, seconds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a checkpoint; one is made without")
    parser.add_argument("--at", default=AT)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        source = Path(options.directory or Path(place, "model"))
        if not options.directory:
            source.mkdir()
            make(source)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        rows = []
        out = Path(place, "parts")
        largest = 0
        for name, code in WAYS.items():
            runs = []
            for _ in range(options.repeat):
                shutil.rmtree(out, ignore_errors=True)
                runs.append(measured(code.format(source=str(source), at=options.at, out=str(out))))
                largest = max([largest, *(path.stat().st_size for path in out.glob("*.safetensors"))])
            rows.append((name, max(peak for peak, _ in runs), min(seconds for _, seconds in runs)))
    print(f"checkpoint {size / 2**20:.0f} MB, largest part {largest / 2**20:.0f} MB; peak: worst of {options.repeat}, ")
    print("time: best\n\n| way | peak, MB | / largest part | / checkpoint | seconds |\n| --- | --- | --- | --- | --- |")
    for name, peak, seconds in rows:
        ratios = f"{peak * 2**20 / largest:.2f} | {peak * 2**20 / size:.2f}"
        print(f"| {name} | {peak:.0f} | {ratios} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
