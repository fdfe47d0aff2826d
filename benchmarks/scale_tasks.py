"""What benchmarks/scale.py runs in processes of their own; each prints what it found as lines `RESULT {json}`.

python benchmarks/scale_tasks.py make-llama 8b|1b FOLDER [--layers N]   random weights, drawn where they are written from
python benchmarks/scale_tasks.py make-converted FOLDER [--layers N]     a Llama of 8B width with MLA, for decoding
python benchmarks/scale_tasks.py heal ...                               `hf-mla heal` that evaluates at the start and the end alone
python benchmarks/scale_tasks.py decode FOLDER REFERENCE [--spread]     under torchrun: tensor parallel
python benchmarks/scale_tasks.py batching FOLDER GQA                    `generate_batch` beside the GQA original
python benchmarks/scale_tasks.py serve FOLDER [--requests 2000]
python benchmarks/scale_tasks.py long                                   one sequence
python benchmarks/scale_tasks.py fits FOLDER results/fits.json          what fits where, by `hf-mla plan`; needs no weights

`--tiny` makes all of it small enough for two CPU cores.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedConfig
from transformers.distributed import DistributedConfig

from hf_mla.cache_mla import CACHE_NAME, cache_of
from hf_mla.configuration_mla import release
from hf_mla_conversion.source.shards import ShardWriter, TensorHeader, file_header
from hf_mla_conversion.source.text import BUNDLED, read_text


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
NO_END = {"bos_token_id": None, "eos_token_id": None}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "max_position_embeddings": 8192}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def result(**values: Any) -> None:
    """Print what was found; of several processes the first does."""
    if RANK == 0:
        print("RESULT " + json.dumps(values), flush=True)


def llama(name: str, layers: int, tiny: bool) -> LlamaConfig:
    """The configuration of a Llama-3-8B ("8b") or Llama-3.2-1B ("1b") of so many layers."""
    shape = TINY if tiny else {"8b": LLAMA_8B, "1b": LLAMA_1B}[name]
    sizes = {"vocab_size": 4608 if tiny else 128256, "num_hidden_layers": layers, "tie_word_embeddings": name == "1b"}
    rope = ROPE | ({"max_position_embeddings": 256} if tiny else {})
    return LlamaConfig(**shape, **sizes, **rope, **NO_END, architectures=["LlamaForCausalLM"], dtype="bfloat16")


def headers(config: PreTrainedConfig) -> dict[str, TensorHeader]:
    """The tensors of a model of this configuration, in bfloat16, by the names of its checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: TensorHeader(tuple(tensor.shape), "BF16") for name, tensor in state.items()}


def make_llama(name: str, folder: str, layers: int, tiny: bool) -> None:
    """Write a Llama of random weights, with the bundled model's tokenizer."""
    config, path, begun = llama(name, layers, tiny), Path(f"{folder}.partial"), time.perf_counter()
    path.mkdir(parents=True)
    tensors = headers(config)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(tensor_name: str) -> torch.Tensor:
        shape = tensors[tensor_name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=DEVICE) * 0.02

    ShardWriter(path, tensors, shard_bytes=1 << 30).write(draw)
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(BUNDLED / "model").save_pretrained(path)
    path.rename(folder)
    result(bytes=sum(tensor.bytes for tensor in tensors.values()), seconds=time.perf_counter() - begun)


def make_converted(folder: str, layers: int, tiny: bool) -> None:
    """Write the Llama of `llama_width.py` with MLA, random weights, and beside it (FOLDER-gqa) the original's configuration."""
    from llama_width import make_model

    torch.manual_seed(0)
    make_model("converted", layers, tiny).save_pretrained(folder)
    make_model("gqa", layers, tiny).save_pretrained(f"{folder}-gqa")
    result(layers=layers)


def heal(words: list[str], tiny: bool) -> None:
    """`hf-mla heal`, whose every step is logged; each process says what it held.

    SCALE_STOP ends it after the last step, and there is no evaluation: speed is measured. Otherwise there are evaluations and
    checkpoints in the middle and at the end.
    """
    from hf_mla_conversion.cli import main
    from hf_mla_conversion.mathematics.distill import DistillationTrainer
    from hf_mla_conversion.stages import end_to_end

    stop, arguments_of = os.environ.get("SCALE_STOP") == "1", end_to_end.training_arguments
    end_to_end.EVALUATIONS, end_to_end.CHECKPOINTS = 2, 1

    def logged(*args: Any) -> Any:
        made = arguments_of(*args)
        made.logging_steps = 1
        if stop:
            made.eval_strategy, made.save_strategy, made.eval_on_start = "no", "no", False
        return made

    end_to_end.training_arguments = logged
    memory_of, planned = end_to_end.memory, {}

    def remembered(*args: Any) -> Any:
        planned.update(memory_of(*args))
        return planned

    end_to_end.memory = remembered
    if tiny and WORLD > 1:  # Accelerate chooses FSDP on GPUs only; what it then does needs none
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedType

        begin = AcceleratorState.__init__

        def begin_sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
            begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
            plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
            if plugin is not None:
                self._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

        AcceleratorState.__init__ = begin_sharded
    train = DistillationTrainer.train

    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = train(self, *args, **kwargs)
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        said: dict[str, Any] = {"rank": RANK, "peak": peak, "planned": planned}
        said["layer"] = type(self.model.get_decoder().layers[0]).__name__
        said["types"] = sorted({str(parameter.dtype) for parameter in self.model.parameters()})
        if RANK == 0 and stop:
            said["history"] = end_to_end.history(self.state.log_history)
        sys.stderr.write(f"\nPROCESS {json.dumps(said)}\n")  # at once, for others write too
        sys.stderr.flush()
        if stop:
            self.accelerator.wait_for_everyone()
            os._exit(0)
        return output

    DistillationTrainer.train = trained
    sys.exit(main(["heal", *words]))


def load(folder: str, dtype: torch.dtype, spread: bool) -> Any:
    """The model on one device; spread over all of them; or, under torchrun, split between the processes."""
    if WORLD > 1:
        split = DistributedConfig(tp_size=WORLD, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=split)
    elif spread:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(DEVICE)
    return model.eval()


@torch.no_grad()
def forced(model: Any, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, n, vocabulary] of each of the tokens [B, n] that follow the prompts [B, T], decoded one by one from a cache."""
    outputs = model(ids, logits_to_keep=1)
    logits, cache = [outputs.logits[:, -1]], cache_of(outputs)
    for token in tokens[:, :-1].split(1, dim=1):
        logits.append(model(token, **{CACHE_NAME: cache}).logits[:, -1])
    return torch.stack([part.float().cpu() for part in logits], dim=1)


def decode(folder: str, reference: str, spread: bool, tiny: bool) -> None:
    """Greedy tokens in float32, logits in bfloat16 for the same tokens (by the kernel), and milliseconds a token.

    One process without `--spread` leaves what it says in REFERENCE, the others compare themselves with that.
    """
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    first = WORLD == 1 and not spread
    ids = torch.randint(1000, (4, 16 if tiny else 512), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    count = 8 if tiny else 48
    settings = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    model = load(folder, torch.float32, spread)
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    weight = model.model.layers[0].self_attn.q_proj.weight
    rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]  # of this process
    tokens = model.generate(ids, **settings)[:, ids.shape[1] :].cpu()
    del model
    model = load(folder, torch.bfloat16, spread)
    said = None if first else torch.load(reference)
    forcing = tokens if said is None else said["tokens"]
    logits = forced(model, ids, forcing.to(DEVICE))
    free = model.generate(ids, **settings)[:, ids.shape[1] :].cpu()
    if said is None:
        if RANK == 0:
            torch.save({"tokens": tokens, "logits": logits, "free": free}, reference)
        result(processes=1, rows_of_queries=rows, tokens=tokens.numel())
    else:
        difference = (logits - said["logits"]).abs().amax(-1)  # [B, n]
        best, second = said["logits"].topk(2).values.unbind(-1)
        other = logits.argmax(-1) != said["logits"].argmax(-1)
        result(
            processes=WORLD,
            devices=places,
            rows_of_queries=rows,
            tokens=tokens.numel(),
            float32_equal=int((tokens == said["tokens"]).sum()),
            bfloat16_logits_differ_by=(difference / said["logits"].std(-1)).max().item(),
            bfloat16_choices_differ=int(other.sum()),
            bfloat16_choices_differ_beyond_rounding=int((other & (best - second > 2 * difference)).sum()),
            bfloat16_generated_equal=int((free == said["free"]).sum()),
        )
    if not spread:
        import step_time

        batch, context, steps = (2, 64, 8) if tiny else (16, 16384, 32)
        torch.manual_seed(0)
        for eager in (True, False):
            measured = step_time.generate(model, batch, context, steps, eager)
            measured = {key: measured[key] for key in ("milliseconds_per_token", "spread", "start_seconds")}
            peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
            result(**{"eager" if eager else "compiled": measured | {"batch": batch, "context": context, "peak": peak}})
    if WORLD > 1:
        torch.distributed.barrier()
        os._exit(0)  # what is recorded in graphs keeps NCCL from ending


def resident() -> dict[str, int]:
    """Bytes that this process holds."""
    on_device = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return {"device": on_device, "host": psutil.Process().memory_info().rss}


def has_batching() -> bool:
    """Whether this Transformers hands the pages of continuous batching to the attention."""
    return release(transformers.__version__) >= (5, 19)


def greedy(tokens: int, end: int = -1) -> GenerationConfig:
    """Greedy generation of so many tokens."""
    return GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=end, pad_token_id=0)


def pages(share: float) -> Any:
    """Settings of continuous batching: pages that take so much of the memory of a GPU, and few of a CPU's."""
    few = {"num_blocks": 64, "page_size": 16, "max_batch_tokens": 64} if DEVICE == "cpu" else {"max_memory_percent": share}
    return transformers.ContinuousBatchingConfig(**few)


def batching(folder: str, gqa: str, tiny: bool) -> None:
    """Requests per second of `generate_batch`: the converted model and its original, prompts of mixed lengths."""
    if not has_batching():
        result(not_run=f"Transformers {transformers.__version__} does not hand pages to the attention; 5.19 does")
        return
    draw = random.Random(0)
    count, longest, new = (6, 60, 4) if tiny else (128, 4096, 64)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(longest // 8, longest))] for _ in range(count)]
    for name, place in (("converted", folder), ("gqa", gqa)):
        model = load(place, torch.bfloat16, False)
        rates = []
        for _ in range(2):  # the first one compiles and records
            begun = time.perf_counter()
            outputs = model.generate_batch(
                inputs=prompts, generation_config=greedy(new), continuous_batching_config=pages(0.8), progress_bar=False
            )
            rates.append(count / (time.perf_counter() - begun))
        answered = sum(len(output.generated_tokens) == new for output in outputs.values())
        result(model=name, requests=count, answered=answered, new_tokens=new, requests_per_second=rates[-1], first_time=rates[0])
        del model


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


@torch.no_grad()
def long(layers: int, tiny: bool) -> None:
    """Prefill of one sequence in chunks and 32 tokens after it, at growing lengths; and what caches of the original take."""
    from llama_width import make_config, make_model

    contexts, chunk = ([256, 512], 128) if tiny else ([65536, 131072, 524288], 4096)
    torch.manual_seed(0)
    model = make_model("converted", layers, tiny)
    model.config.max_position_embeddings = 1 << 20
    if DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        weights = 2 * 8.03e9
        for name in ("gqa", "converted"):
            config = make_config(name, 32, tiny)
            width = config.kv_lora_rank + config.qk_rope_head_dim if name == "converted" else 2 * 8 * 128
            per_token = 32 * width * 2
            largest = int((total - weights - 4e9) / per_token)  # 4 GB: chunks of the prefill, the context of CUDA
            result(model=f"{name}, 8B, 32 layers", cache_bytes_per_token=per_token, largest_context_computed=largest, memory=total)
    for context in contexts:
        cache, ids = None, torch.randint(1000, (1, context), device=DEVICE)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for part in ids.split(chunk, dim=1):
            outputs = model(part, **({CACHE_NAME: cache} if cache is not None else {}), use_cache=True, logits_to_keep=1)
            cache = cache_of(outputs)
        token = outputs.logits[:, -1:].argmax(-1)
        token.tolist()  # waits
        prefill, steps = time.perf_counter() - begun, []
        for _ in range(32):
            begun = time.perf_counter()
            token = model(token, **{CACHE_NAME: cache}).logits[:, -1:].argmax(-1)
            token.tolist()
            steps.append(1000 * (time.perf_counter() - begun))
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        held = sum(layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)
        decoded = {"milliseconds_per_token": statistics.median(steps), "peak": peak, "cache_bytes": held}
        result(context=context, layers=layers, chunk=chunk, prefill_seconds=prefill, **decoded)
        del cache, outputs


def write_headers(config: PreTrainedConfig, folder: Path) -> None:
    """A checkpoint with configuration and headers; its numbers are holes in files, which take no room."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tensors = headers(config)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(file_header(tensors))
        file.truncate(file.tell() + sum(tensor.bytes for tensor in tensors.values()))


def known_models() -> dict[str, PreTrainedConfig]:
    """Configurations of models that people have, by name."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    llama_70b = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    qwen_32b = {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    qwen_235b = {"hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64}
    qwen_235b |= {"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936}
    context = {"max_position_embeddings": 40960, "tie_word_embeddings": False}
    return {
        "Llama-3-8B": llama("8b", 32, tiny=False),
        "Qwen3-32B": Qwen3Config(**qwen_32b, **context, num_hidden_layers=64, vocab_size=151936),
        "Llama-3-70B": LlamaConfig(**llama_70b, head_dim=128, num_hidden_layers=80, vocab_size=128256, **ROPE),
        "Qwen3-235B-A22B": Qwen3MoeConfig(**qwen_235b, **context, num_hidden_layers=94, norm_topk_prob=True),
    }


def fits(folder: str, out: str) -> None:
    """What `hf-mla plan` says of models of which there are only headers here, and what training them takes by `memory`."""
    from hf_mla_conversion import plan
    from hf_mla_conversion.commands.heal import trained_parameters
    from hf_mla_conversion.commands.plan import memory_estimate
    from hf_mla_conversion.mathematics.closed_form import mla_config
    from hf_mla_conversion.source.checkpoint import open_checkpoint
    from hf_mla_conversion.source.matching import match_model
    from hf_mla_conversion.stages.end_to_end import LORA_RANK, Training, memory

    found = []
    for name, config in known_models().items():
        place = Path(folder) / name
        write_headers(config, place)
        checkpoint = match_model(open_checkpoint(str(place), headers_only=True))
        planned = plan(str(place), kv_lora_rank=512, qk_rope_head_dim=64)
        assert planned.bytes_written is not None and planned.kv_bytes_per_token is not None
        converted = mla_config(checkpoint.config, 512, 64, "bfloat16")
        numbers = planned.bytes_written // 2
        heals = {}
        for what in ("lora", "all"):
            trained = numbers if what == "all" else trained_parameters(checkpoint, what, LORA_RANK)
            training = Training(what, 1, 0.0, 1, 1, 0, 1, gradient_checkpointing=True)
            types, sizes = (torch.bfloat16, torch.bfloat16), (numbers, checkpoint.parameters, trained)
            heals[f"heal_{what}"] = memory(converted, sizes, types, training, 2048, torch.device("cuda"))
        cache = planned.kv_bytes_per_token
        found.append(
            {
                "model": name,
                "parameters": checkpoint.parameters,
                "kv_bytes_per_token": {"source": cache.source, "converted": cache.converted},
                "bytes": planned.bytes_read,
                "convert_gpu": memory_estimate(checkpoint, (512, 64), 0, "cuda"),
                "hidden_states": 2097152 * config.hidden_size * 2,
                "convert_cpu": planned.peak_memory_bytes,
                **heals,
            }
        )
        result(**found[-1])
    Path(out).write_text(json.dumps({"models": found}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["heal"]:
        tiny = os.environ.get("SCALE_TINY") == "1"
        heal(sys.argv[2:], tiny)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    words, tiny = arguments.words, arguments.tiny
    torch.set_grad_enabled(False)
    match arguments.task:
        case "make-llama":
            make_llama(*words, arguments.layers, tiny)
        case "make-converted":
            make_converted(*words, arguments.layers, tiny)
        case "decode":
            decode(*words, arguments.spread, tiny)
        case "batching":
            batching(*words, tiny)
        case "serve":
            serve(*words, arguments.requests, tiny)
        case "long":
            long(arguments.layers, tiny)
        case "fits":
            fits(*words)
        case task:
            parser.error(f"there is no task {task}")
