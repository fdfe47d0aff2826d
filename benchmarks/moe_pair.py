"""Convert two layers of the shape of Qwen3-30B-A3B, 128 experts each, with random weights: seconds and peak memory.

python benchmarks/moe_pair.py [--tiny] [--experts 128] [--layers 2] [--tokens N] [--steps N] [--out FILE.json]

The checkpoint is made first, in bfloat16, in a temporary folder (TMPDIR) and by a process of its own, whose memory is not counted.
The conversion is that of `hf-mla convert` with its defaults and a given text, without the end-to-end stage. Peaks of memory are
beyond what the process takes before it; on the host they include pages of the files that are read.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from llama_width import DEVICE, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from hf_mla_conversion.commands.convert import convert
from hf_mla_conversion.source.text import BUNDLED


WIDTH = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "vocab_size": 151936}
WIDTH |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
TINY_WIDTH = {"hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 24, "vocab_size": 4096}
TINY_WIDTH |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def make_source(folder: str, experts: int, layers: int, tiny: bool) -> None:
    """Write the checkpoint."""
    config = Qwen3MoeConfig(
        **(TINY_WIDTH if tiny else WIDTH),
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_hidden_layers=layers,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(folder)


def host_peak() -> int:
    """The most memory that this process has taken so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Convert `folder`/source and say what it took."""
    before = psutil.Process().memory_info().rss
    text = str(BUNDLED / "calibration.txt.xz")
    report = convert(str(folder / "source"), str(folder / "out"), calibration=text, heal_tokens=0, **options)
    result = {
        "seconds": round(report.seconds, 1),
        "calibration_tokens": report.calibration_tokens,
        "steps": report.steps,
        "kv_lora_rank": report.kv_lora_rank,
        "qk_rope_head_dim": report.qk_rope_head_dim,
        "errors": [round(layer.error, 4) for layer in report.layers],
        "bytes_read": report.bytes_read,
        "host_bytes": host_peak() - before,
    }
    if DEVICE == "cuda":
        result |= {"gpu_bytes": torch.cuda.max_memory_allocated(), "gpu_reserved_bytes": torch.cuda.max_memory_reserved()}
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a small model, to try it on a CPU")
    parser.add_argument("--tokens", type=int, help="of calibration; the program's default if not given")
    parser.add_argument("--steps", type=int, help="per layer; the program's default if not given")
    parser.add_argument("--out", help="a JSON file to write what was measured to")
    arguments = parser.parse_args()
    shape = {"experts": arguments.experts, "layers": arguments.layers, "tiny": arguments.tiny}
    given = {"calibration_tokens": arguments.tokens, "steps": arguments.steps}
    with tempfile.TemporaryDirectory() as scratch:
        maker = multiprocessing.get_context("spawn").Process(target=make_source, args=(f"{scratch}/source", *shape.values()))
        maker.start()
        maker.join()
        measured = json.dumps(machine() | shape | measure(Path(scratch), given), indent=2)
    print(measured)
    if arguments.out:
        Path(arguments.out).write_text(measured + "\n", encoding="utf-8")
