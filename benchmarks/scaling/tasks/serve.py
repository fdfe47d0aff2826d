"""Many requests at once, of which some are cancelled and some malformed: all others are answered, and memory stays flat."""

import random
import time
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from hf_mla_conversion.source.text import BUNDLED, read_text

from .decode import greedy, has_batching, pages
from .process import DEVICE, load, result


class Requests:
    """Requests of mixed lengths from held-out text, some of which are cancelled and some malformed.

    Args:
        count: how many.
        tokenizer: of the model.
        longest: tokens of a prompt.
    """

    def __init__(self, count: int, tokenizer: Any, longest: int) -> None:
        draw = random.Random(0)
        ids = tokenizer(read_text(str(BUNDLED / "validation.txt.xz"), 1 << 17), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        self.prompts: list[list[int]] = []
        for _ in range(count):
            length = draw.randint(4, longest)
            start = draw.randrange(len(ids) - length)
            self.prompts.append(ids[start : start + length])
        self.tokens = [draw.randint(4, 48) for _ in range(count)]
        self.cancelled = set(range(7, count, 40))
        self.malformed = set(range(23, count, max(1, count // 6)))
        for number, place in enumerate(sorted(self.malformed)):
            self.prompts[place] = None if number % 2 else []  # type: ignore[call-overload]
        self.plain = [place for place in range(count) if place not in self.cancelled and place not in self.malformed]


def resident() -> dict[str, int]:
    """Bytes that this process holds."""
    on_device = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return {"device": on_device, "host": psutil.Process().memory_info().rss}


def serve_batches(model: Any, requests: Requests, watch: Any) -> dict[int, Any]:
    """Answers by `generate_batch`'s manager, requests sent as fast as it takes them."""
    answers: dict[int, Any] = {}
    options = {"generation_config": greedy(48), "continuous_batching_config": pages(0.2), "block": True, "timeout": 60}
    with model.continuous_batching_context_manager(**options) as manager:
        sent = 0
        while len(answers) < len(requests.prompts):
            while sent < len(requests.prompts) and sent - len(answers) < 256:
                try:
                    given = manager.add_request(requests.prompts[sent], str(sent), requests.tokens[sent], eos_token_id=-1)
                    error = None if given is not None else "refused"
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"
                if error is not None:
                    answers[sent] = error
                elif sent in requests.cancelled:
                    manager.cancel_request(str(sent))
                    answers[sent] = "cancelled"
                sent += 1
            output = manager.get_result(timeout=20)
            if output is None:
                if all(place in answers for place in range(sent)) and sent == len(requests.prompts):
                    break
                if not manager.is_running():
                    raise RuntimeError(f"the manager ended after {len(answers)} answers: {manager.background_thread_status}")
                answers |= {place: "no answer in 20 s" for place in range(sent) if place not in answers}
                continue
            place = int(output.request_id)
            if place not in requests.cancelled and output.is_finished():
                answers[place] = output.error or output.generated_tokens
                watch(len(answers))
    return answers


def serve_pipeline(model: Any, tokenizer: Any, requests: Requests, watch: Any) -> dict[int, Any]:
    """Answers by `generate` on batches padded on the left, as the text-generation pipeline does; bad requests alone fail."""
    answers: dict[int, Any] = {}

    def answer(places: list[int]) -> None:
        try:
            longest = max(len(requests.prompts[place]) for place in places)
            if not all(requests.prompts[place] for place in places):
                raise ValueError("an empty prompt")
            ids = torch.zeros(len(places), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                prompt = requests.prompts[place]
                ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), 1
            gone = torch.tensor([place in requests.cancelled for place in places], device=DEVICE)
            config = greedy(max(requests.tokens[place] for place in places))
            output = model.generate(
                ids.to(DEVICE),
                attention_mask=mask.to(DEVICE),
                generation_config=config,
                stopping_criteria=[lambda *_args, **_kwargs: gone],  # after its first token, as a user who has left
            )
        except Exception as error:
            if len(places) == 1:
                answers[places[0]] = f"{type(error).__name__}: {error}"
            else:  # the halves, until the bad one is alone
                answer(places[: len(places) // 2])
                answer(places[len(places) // 2 :])
            return
        for place, row in zip(places, output[:, longest:].tolist(), strict=True):
            answers[place] = "cancelled" if place in requests.cancelled else row[: requests.tokens[place]]

    order = list(range(len(requests.prompts)))
    for start in range(0, len(order), 50):
        answer(order[start : start + 50])
        watch(len(answers))
    return answers


@torch.no_grad()
def serve(folder: str, count: int, tiny: bool) -> None:
    """Requests on one device: all answered, memory flat, and a sample as `generate` alone answers it."""
    # On a CPU, bfloat16 products of every new shape are compiled, and kept.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model, tokenizer = load(folder, dtype, False), AutoTokenizer.from_pretrained(folder)
    requests = Requests(count, tokenizer, 60 if tiny else 600)
    samples: list[dict[str, Any]] = []

    def watch(answered: int) -> None:
        if len(samples) <= answered * 20 // count:
            samples.append({"answered": answered, **resident()})

    begun = time.perf_counter()
    answers = serve_batches(model, requests, watch) if has_batching() else serve_pipeline(model, tokenizer, requests, watch)
    seconds = time.perf_counter() - begun
    lost = [place for place in requests.plain if not isinstance(answers.get(place), list)]
    short = [p for p in requests.plain if isinstance(answers.get(p), list) and len(answers[p]) != requests.tokens[p]]
    result(
        way="generate_batch" if has_batching() else "batches of 50 through generate",
        requests=count,
        answered=len(requests.plain) - len(lost) - len(short),
        expected=len(requests.plain),
        lost=[[place, str(answers.get(place))[:100]] for place in (lost + short)[:5]],
        cancelled=len(requests.cancelled),
        malformed={str(place): str(answers.get(place))[:100] for place in sorted(requests.malformed)},
        seconds=seconds,
        requests_per_second=count / seconds,
        memory_after_first_tenth=samples[min(2, len(samples) - 1)],
        memory_at_the_end=samples[-1],
        memory=[list(sample.values()) for sample in samples],
    )
    if has_batching() and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    equal, beyond, checked = 0, [], random.Random(1).sample([p for p in requests.plain if p not in lost], 10 if tiny else 50)
    for place in checked:
        ids = torch.tensor([requests.prompts[place]], device=DEVICE)
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy(requests.tokens[place]))
        alone, ours = alone[0, ids.shape[1] :].tolist(), answers[place]
        if alone == ours:
            equal += 1
            continue
        split = next(i for i, (a, b) in enumerate(zip(alone, ours, strict=True)) if a != b)
        prefix = torch.tensor([requests.prompts[place] + alone[:split]], device=DEVICE)
        exact = load(folder, torch.float32, False)(prefix, logits_to_keep=1).logits[0, -1]
        rounding = (model(prefix, logits_to_keep=1).logits[0, -1] - exact).abs().max().item()
        gap = (exact[alone[split]] - exact[ours[split]]).abs().item()
        if gap > 2 * rounding:
            beyond.append({"request": place, "token": split, "gap": gap, "rounding": rounding})
    result(sample=len(checked), equal=equal, differ_by_rounding=len(checked) - equal - len(beyond), differ=beyond)
