# SPDX-License-Identifier: Apache-2.0
"""Text that a model writes itself: what it was trained on, as far as the model knows it, when nobody can say what that was.

* Half of the sequences are written freely, each text from what the tokenizer puts before every text, or from a random token where
  it puts nothing; half are chats, where the tokenizer has a chat template: the model writes the user's part too. Both go on to
  the end of the sequence, with new texts and new turns.
* All sequences of a batch grow together, token by token, in one cache that is filled in place. A batch is as large as memory
  allows, since a step of thousands of sequences costs hardly more than one of a few.
* On a GPU a step is captured as a CUDA graph, once for every 64 tokens, and replayed: launching its kernels one by one takes far
  longer than they run. Keys and values are read by the kernel that decodes from latents, where it serves.
* Tokens are drawn as likely as the model finds them: text that was cut to what is likely, or written at several temperatures,
  teaches less of other texts (docs/reconstruction.md).
"""

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_mla.attention_mla import attended_range, can_decode, latent_decode
from hf_mla.cache_mla import CACHE_NAME

from ..errors import UserError
from .checkpoint import Checkpoint
from .families import experts_per_token, kv_heads
from .loading import compute_dtype, free_memory, head_of, load_model
from .lookups import LOOKUPS
from .shards import load_file, save_file
from .tokenizer import first_token


logger = logging.getLogger(__name__)

OWN_TEXT = "self"  # in place of a text's name
BUNDLED_NAME = "bundled English prose"
LENGTH = 1024  # tokens of a sequence, at most
MEMORY_SHARE = 0.6  # of what is free, for keys, values and logits
# A CPU writes own text unasked if it has at most this share of the tokens that the steps of a layer go through: a token written
# takes half to all of the time that one fitted to takes (docs/reconstruction.md).
CPU_SHARE = 0.2
TIMED_TOKENS = 4  # of each sequence, for an estimate of the time that writing takes
ALONE = (
    "calibrating on the bundled English prose and lookups made of it: text of its own would take %s more than a fifth of the fit's "
    "time, or more memory than is free. Other kinds of text lose more: layers of SmolLM2-135M had errors of 0.191 on wikitext-2 "
    "and 0.122 on its own text, with half of it own text 0.177 and 0.098. Give a --calibration like your text, or self"
)
MOST_SEQUENCES = {"cuda": 4096, "cpu": 32}  # in a batch
# Not cuDNN's, which plans anew for every length of the cache: 45 s for a thousand.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BLOCK = 64  # tokens by which what is attended to grows
GROUPED = "one_token_grouped"  # the name of `grouped_attention`
WRITING = -1  # in place of a position in a script


class FullLayer(DynamicLayer):
    """One layer's keys and values [B, g, T, d], written in place into room for all tokens there will be.

    Args:
        room: tokens, whole blocks.
        position: [1], where the next token is written.
    """

    def __init__(self, room: int, position: Tensor) -> None:
        super().__init__()
        self.room, self.position, self.stop = room, position, BLOCK
        self.whole: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values [B, g, 1, d] of the next token; returns those of all tokens up to the end of its block."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.whole = [new.new_zeros(*new.shape[:2], self.room, new.shape[-1]) for new in (key_states, value_states)]
        block = torch.arange(self.stop - BLOCK, self.stop, device=self.position.device)
        here = (block == self.position).unsqueeze(-1)  # [64, 1]
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            last = whole[:, :, self.stop - BLOCK : self.stop]
            last.copy_(torch.where(here, new, last))
        self.keys, self.values = (whole[:, :, : self.stop] for whole in self.whole)
        return self.keys, self.values


def in_kernel(key: Tensor, value: Tensor) -> bool:
    """Whether the kernel that decodes from latents is to read keys and values [B, g, T, d]: where it was seen to be faster."""
    if latent_decode is None or key.device.type != "cuda" or key.dtype.itemsize != 2:
        return False
    width = key.shape[-1]
    return value.shape[-1] == width and width in (64, 128) and can_decode(key.device.index, width, width)


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token; the heads that share keys are taken as tokens, so the keys are read once for all of them.

    A kernel works on many tokens of a head at a time: with one, almost all of its work is thrown away. That of latents knows of
    heads that share them: to it values are latents, and keys rotary keys, before which a query has zeros.

    Args:
        module: the attention module.
        query: [B, H, 1, d].
        key: [B, g, T, d].
        value: [B, g, T, d].
        attention_mask: None, or broadcastable to [B, 1, 1, T].
        scaling: factor on the scores.
        sliding_window: how many tokens it attends to, None for all.
        softcap: what scores are capped at.
        s_aux: [H], sinks.
        **kwargs: for other kinds of attention.

    Returns:
        The output [B, 1, H, d], and None for the weights.
    """
    if sliding_window is not None and attention_mask is not None:
        places = torch.arange(key.shape[2], device=key.device)
        attention_mask = attention_mask & (places > attention_mask.sum() - 1 - sliding_window)
    rows = query.squeeze(2).unflatten(1, (key.shape[1], -1))  # [B, g, H / g, d]
    if attention_mask is not None and s_aux is None and in_kernel(key, value):
        width = value.shape[-1]
        queries = nn.functional.pad(rows.flatten(0, 1), [width, 0]).unsqueeze(2)  # [B g, H / g, 1, d + d]
        latents, rest, attended = value.flatten(0, 1), key.flatten(0, 1), attended_range(attention_mask)  # [B g, T, d] each
        output = latent_decode(queries, latents, rest, width, scaling, attended=attended, softcap=softcap or 0.0)
        return output.transpose(0, 1).reshape(len(query), 1, -1, width), None  # from [H / g, B g, 1, d]
    if softcap is not None or s_aux is not None:
        scores = rows @ key.mT * scaling  # [B, g, H / g, T]
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~attention_mask, -torch.inf) if attention_mask is not None else scores
        if s_aux is not None:
            sinks = s_aux.to(scores.dtype).view(1, *rows.shape[1:3], 1).expand(len(rows), -1, -1, -1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)[..., : key.shape[2]]
        return (weights @ value).flatten(1, 2).unsqueeze(1), None
    output = nn.functional.scaled_dot_product_attention(rows, key, value, attention_mask, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(GROUPED, grouped_attention)


def chat_scripts(tokenizer: Any) -> list[list[int]] | None:
    """What stands around the words in a chat, as token ids.

    Args:
        tokenizer: of the model.

    Returns:
        What comes before the user's first words, between these and the answer, and between an answer and the user's next words;
        None if there is no chat template that gives all three.
    """
    words = ["first words of mine", "first words of yours", "more words of mine"]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), words, strict=True)]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        parts = []
        for word in words:
            part, text = text.split(word)
            parts.append(tokenizer(part, add_special_tokens=False)["input_ids"])
    except Exception:  # templates are programs: any type
        return None
    return parts if all(parts) else None


class Scribe:
    """What each sequence of a batch is at: writing, or copying what a chat template has between turns.

    Args:
        tokenizer: of the model.
        ends: ids that end a text or a turn.
        count: sequences; every second one is a chat if there is a template.
        device: of all tensors.
        generator: draws the first tokens of free texts.
    """

    def __init__(self, tokenizer: Any, ends: list[int], count: int, device: torch.device, generator: torch.Generator) -> None:
        scripts = chat_scripts(tokenizer)
        self.generator = generator
        special = {*tokenizer.all_special_ids, *ends}
        begin = first_token(tokenizer)
        starts = [i for i in range(len(tokenizer)) if i not in special] if begin is None else [begin]
        self.starts = torch.tensor(starts, device=device)
        self.chat = torch.arange(count, device=device) % 2 == 1 if scripts else torch.zeros(count, dtype=torch.bool, device=device)
        scripts = scripts or [[0], [0], [0]]
        self.lengths = torch.tensor([len(script) for script in scripts], device=device)
        width = max(map(len, scripts))
        self.scripts = torch.tensor([script + [0] * (width - len(script)) for script in scripts], device=device)
        self.ends = torch.tensor(ends, device=device, dtype=torch.long)
        self.script = torch.zeros(count, dtype=torch.long, device=device)  # which of them comes next, or is being copied
        self.at = torch.zeros(count, dtype=torch.long, device=device)  # which of its tokens is next, or WRITING

    def next(self, drawn: Tensor) -> Tensor:
        """The next token of each sequence [B], given what the model would write [B]."""
        copied = self.scripts[self.script, self.at.clamp_min(0)]
        at_random = torch.randint(len(self.starts), drawn.shape, device=drawn.device, generator=self.generator)
        given = torch.where(self.chat, copied, self.starts[at_random])
        writing = self.at == WRITING
        ended = writing & (torch.isin(drawn, self.ends) | (self.chat & (drawn == self.scripts[self.script, 0])))
        # A turn's end is the beginning of what the template has there, a free text's the token that was drawn.
        tokens = torch.where(writing, torch.where(ended & self.chat, self.scripts[self.script, 0], drawn), given)
        self.at = torch.where(ended, self.chat.long(), torch.where(writing, WRITING, self.at + 1))
        done = (self.at >= 0) & ~(ended & ~self.chat) & (self.at >= torch.where(self.chat, self.lengths[self.script], 1))
        self.at = self.at.masked_fill(done, WRITING)
        self.script = torch.where(done, self.script % 2 + 1, self.script)  # 0, 1, 2, 1, 2, ...
        return tokens


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits [B, vocabulary].

    The largest of p / e, with e exponentially distributed, is distributed as p; so is the largest of logit - log e.
    For a batch of thousands it counts how often the whole table is read and written.
    """
    scores = torch.empty_like(logits, dtype=torch.promote_types(logits.dtype, torch.float32))
    if logits.device.type == "cpu":  # where its own exponential numbers take most of the time of a draw
        scores.uniform_(torch.finfo(scores.dtype).tiny, generator=generator).log_().neg_()
    else:
        scores.exponential_(generator=generator)
    return torch.sub(logits, scores.log_(), out=scores).argmax(-1)


def sequences_at_once(config: Any, length: int, device: torch.device, itemsize: int) -> int:
    """How many sequences fit in memory, at most as many as are worth it; an even number."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * kv_heads(config) * head_dim * length * itemsize
    fitting = int(MEMORY_SHARE * free_memory(device) / (cached + 12 * config.vocab_size))
    return max(2, min(MOST_SEQUENCES[device.type], fitting) // 2 * 2)


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function captured as a CUDA graph; a call replays it on what its inputs hold by then."""
    step()  # what is set up at the first call is no part of a graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@torch.no_grad()
def write_text(model: Any, tokenizer: Any, count: int, length: int, seed: int, written: Callable[[], Any] = lambda: None) -> Tensor:
    """Let a model write.

    Args:
        model: a causal language model of Transformers in evaluation mode.
        tokenizer: its tokenizer.
        count: sequences.
        length: tokens of each.
        seed: of what is drawn.
        written: called when another token of each is there.

    Returns:
        Token ids [count, length], on the CPU.
    """
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)
    ends = {tokenizer.eos_token_id, *torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()} - {None}
    scribe = Scribe(tokenizer, sorted(ends), count, device, generator)
    ids = torch.empty(count, length, dtype=torch.long, device=device)
    tokens = scribe.next(torch.zeros(count, dtype=torch.long, device=device))
    position, room = torch.zeros(1, dtype=torch.long, device=device), math.ceil(length / BLOCK) * BLOCK
    layers, cache = [FullLayer(room, position) for _ in range(model.config.num_hidden_layers)], DynamicCache()
    cache.layers = [*layers]

    def step() -> Tensor:
        mask = torch.arange(layers[0].stop, device=device) <= position
        place = {"attention_mask": mask.view(1, 1, 1, -1), "position_ids": position.unsqueeze(0), CACHE_NAME: cache}
        return model.get_decoder()(input_ids=tokens.unsqueeze(1), **place).last_hidden_state[:, -1]

    head = head_of(model)
    before, model.config._attn_implementation = model.config._attn_implementation, GROUPED
    replay = step
    # Without tensor cores the library's experts are multiplied one by one, and how many tokens each has is looked at on the CPU.
    whole = device.type == "cuda" and not (experts_per_token(model.config) and model.dtype == torch.float32)
    try:
        with sdpa_kernel(ATTENTION):
            for place in range(length):
                ids[:, place] = tokens
                written()
                if place + 1 == length:
                    break
                position.fill_(place)
                if place % BLOCK == 0:
                    for layer in layers:
                        layer.stop = place + BLOCK
                    if whole:
                        replay = captured(step)
                tokens.copy_(scribe.next(draw(head(replay()), generator)))  # [B, D] -> [B]
    finally:
        model.config._attn_implementation = before
    return ids.cpu()


def minutes_to_write(model: Any, tokenizer: Any, sizes: Sequence[int], length: int) -> float:
    """How long batches of so many sequences take at least: their first tokens are timed, later ones have more before them."""
    started = time.perf_counter()
    write_text(model, tokenizer, sizes[0], TIMED_TOKENS + 1, 0)  # the last is drawn and not read
    return (time.perf_counter() - started) / TIMED_TOKENS * length * len(sizes) / 60


def own_text_fits(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the whole model fits in what is free on a device, with room to write."""
    return 1.5 * checkpoint.parameters * compute_dtype(checkpoint, device).itemsize < free_memory(device)


def text_names(
    calibration: str | Sequence[str] | None,
    checkpoint: Checkpoint,
    device: torch.device,
    tokens: int,
    fitted: int,
    earlier: str | None = None,
) -> list[str]:
    """The texts to calibrate on: as given; else the bundled one, what the source writes where there is memory and time for it, and
    lookups.

    Args:
        calibration: as given.
        checkpoint: the source.
        device: where to compute.
        tokens: of calibration text.
        fitted: tokens that the steps of a layer go through.
        earlier: what an earlier call to the same end chose, as its recipe has it: what is free may be another number now.

    Returns:
        Names, none twice.

    Raises:
        UserError: none is given, or there is no memory for what is asked for.
    """
    if calibration is None:
        alone, both = [BUNDLED_NAME, LOOKUPS], [BUNDLED_NAME, OWN_TEXT, LOOKUPS]
        if earlier in (" and ".join(alone), " and ".join(both)):
            return both if OWN_TEXT in earlier.split() else alone
        in_time = device.type == "cuda" or tokens // len(both) <= CPU_SHARE * fitted
        return both if in_time and own_text_fits(checkpoint, device) else alone
    names = [calibration] if isinstance(calibration, str) else list(dict.fromkeys(calibration))
    if not names:
        raise UserError("--calibration names no text; give a file, a data set or self, or leave it out")
    if OWN_TEXT in names and not own_text_fits(checkpoint, device):
        raise UserError(f"--calibration self needs all of {checkpoint.name} on {device}, and half of that again; give another text")
    return names


def own_length(checkpoint: Checkpoint, window: int) -> int:
    """Tokens of a sequence of own text, for windows of so many."""
    return min(LENGTH, window, getattr(checkpoint.config, "sliding_window", None) or window)


def own_windows(
    checkpoint: Checkpoint, tokenizer: Any, folder: Path, device: torch.device, tokens: int, window: int, seed: int
) -> Tensor:
    """Windows of text that a checkpoint's model writes, as far as they are not written yet.

    Args:
        checkpoint: of the model.
        tokenizer: of the model.
        folder: where each batch is kept when it is done; a later call takes up what is there.
        device: where to compute.
        tokens: how many are wanted.
        window: tokens of a window; sequences of at most 1,024 are put end to end.
        seed: of what is drawn.

    Returns:
        Token ids [windows, window].
    """
    length = own_length(checkpoint, window)
    joined = max(1, window // length)
    count = max(4, tokens // (joined * length)) * joined  # sequences
    plan = folder / "own-text.json"
    dtype = compute_dtype(checkpoint, device)
    if not plan.exists():  # what is free may be another number in a later call
        plan.write_text(json.dumps(sequences_at_once(checkpoint.config, length, device, dtype.itemsize)), encoding="utf-8")
    batches = -(-count // json.loads(plan.read_text(encoding="utf-8")))
    sizes = [len(part) for part in torch.arange(count).tensor_split(batches)]  # one of a few takes as long as one of many
    files = [folder / f"own-text-{number:04}.safetensors" for number in range(len(sizes))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    if missing:
        model = load_model(checkpoint, device, dtype)
        if device.type == "cpu":
            logger.warning(
                "%s writes %s tokens to calibrate on, which takes %.1f minutes or more; another --calibration would take none",
                checkpoint.name,
                f"{sum(sizes[number] for number in missing) * length:,}",
                minutes_to_write(model, tokenizer, [sizes[number] for number in missing], length),
            )
        with tqdm(total=len(missing) * length, desc=f"writing {count:,} sequences", unit="step") as bar:
            for number in missing:
                ids = write_text(model, tokenizer, sizes[number], length, (seed * len(files) + number) % 2**63, bar.update)
                save_file({"ids": ids.int()}, files[number])
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows = torch.cat([load_file(file)["ids"] for file in files]).long()
    # In a batch, free text and chats take turns.
    rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return rows.view(count // joined, joined * length)


def write_own_text(tokenizer: Any, windows: Tensor, length: int, file: Path) -> None:
    """Write own text as a calibration text for other conversions: a line for each sequence, special tokens as they are read."""
    texts = tokenizer.batch_decode(windows.view(-1, length), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
