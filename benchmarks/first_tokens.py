"""How many tokens a converted model fails to make its sink when they come first in a sequence, and what that costs.

python benchmarks/first_tokens.py SOURCE OUT --text FILE [--tokens 1024]

Many models rest their attention on a sequence's first token, whose hidden state they make a hundred times as large as others'
(SmolLM2: in the thirteenth layer). Where a conversion does not, the whole sequence is lost. Tokens are drawn from the vocabulary,
and from a text as often as it has them; each is followed by 23 tokens of the text. A state is small if it has less than a third of
the original's root mean square where that is largest. The divergence is Kullback and Leibler's, in nats, behind the first token.
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from hf_mla_conversion.mathematics.distill import divergence
from hf_mla_conversion.source.checkpoint import open_checkpoint
from hf_mla_conversion.source.loading import load_model
from hf_mla_conversion.source.text import read_text
from hf_mla_conversion.source.tokenizer import load_tokenizer


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, BATCH = 24, 64

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source")
parser.add_argument("out")
parser.add_argument("--text", required=True)
parser.add_argument("--tokens", type=int, default=1024, help="sequences of each kind")
arguments = parser.parse_args()


@torch.inference_mode()
def run(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square of the first token's state by layer [layers, B], and logits [B, T, vocabulary]."""
    output = model(ids.to(DEVICE), output_hidden_states=True, use_cache=False)
    return torch.stack([state[:, 0].float().square().mean(-1).sqrt() for state in output.hidden_states[:-1]]), output.logits


def measure(name: str, firsts: Tensor) -> None:
    """Print a line for sequences that begin with such tokens [N]."""
    small, apart = [], []
    for first, rest in zip(firsts.split(BATCH), followers.split(BATCH), strict=True):
        ids = torch.cat([first.unsqueeze(1), rest], dim=1)
        (theirs, expected), (ours, found) = run(source, ids), run(out, ids)
        layer = theirs.median(1).values.argmax()
        small.append(ours[layer] < theirs[layer] / 3)
        apart += [divergence(a[1:], b[1:], 1)[0] / (LENGTH - 1) for a, b in zip(found, expected, strict=True)]
    each = torch.stack(apart).float().cpu()
    print(
        f"{name:9} small {torch.cat(small).float().mean().item():.4f}  divergence mean {each.mean().item():.3f}"
        f"  median {each.median().item():.3f}  of the worst hundredth {each.quantile(0.99).item():.3f} and more",
        flush=True,
    )


checkpoints = [open_checkpoint(name) for name in (arguments.source, arguments.out)]
tokenizer = load_tokenizer(checkpoints[0].folder, arguments.source)
dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
source, out = (load_model(checkpoint, DEVICE, dtype) for checkpoint in checkpoints)
text = torch.tensor(tokenizer(read_text(arguments.text, LENGTH * arguments.tokens, tokenizer=tokenizer))["input_ids"])
generator = torch.Generator().manual_seed(0)
places = torch.randint(len(text) - LENGTH, (arguments.tokens,), generator=generator)
followers = text[places.unsqueeze(1) + torch.arange(1, LENGTH)]
words = torch.tensor([number for number in range(len(tokenizer)) if number not in tokenizer.all_special_ids])
measure("any", words[torch.randint(len(words), (arguments.tokens,), generator=generator)])
measure("frequent", text[places])
