"""What tests/test_integration.py has two processes do together; the first one saves the results.

They are one that forks once all is imported: to have torchrun start two takes twice as long as what they do.
"""

import os
import socket
from unittest import mock

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from native_models import read
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from hf_mla import attention_mla, cache_of


IDS = torch.randint(1, 96, (2, 72), generator=torch.Generator().manual_seed(0))


def counted_absorption():
    """Within this, the calls of absorbed attention are counted."""
    return mock.patch.object(attention_mla, "absorbed_attention", wraps=attention_mla.absorbed_attention)


@torch.no_grad()
def speak(model, ids=IDS, prompt=64):
    """The logits of all tokens at once, of the last ones token by token, and what is generated."""
    cache = cache_of(model(ids[:, :prompt]))
    decoded = [model(part, cache=cache).logits for part in ids[:, prompt:].split(1, dim=1)]
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return model(ids).logits, torch.cat(decoded, dim=1), tokens


def train(model, accelerator=None):
    """Losses of a few steps over a batch of 4, of which each process has its share."""
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.arange(1, 49).view(4, 12)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
        ids = ids.chunk(accelerator.num_processes)[accelerator.process_index]
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() if accelerator is None else accelerator.reduce(loss.detach(), "mean"))
    return torch.stack(losses), model


def tensor_parallel(folder):
    """What a model of which each process holds half says; the gradients of what both hold; and the numbers in its cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    with counted_absorption() as absorbed:
        spoken = speak(model)
    ids = torch.arange(1, 41).view(2, 20)
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "norm" in name or "kv_a_proj" in name}
    gradients = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in gradients.items()}
    cache = cache_of(model(ids)).layers[0].keys
    return {"spoken": spoken, "absorbed": absorbed.call_count, "gradients": gradients, "cache": cache}


def native_tensor_parallel(folder):
    """The logits of the library's model, and how often it has absorbed."""
    split = DistributedConfig(tp_size=2, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=split, attn_implementation="hf_mla")
    with counted_absorption() as absorbed:
        return {"logits": read(model, [16, 1, 1, 1, 1, 1, 1], DynamicCache(config=model.config)), "absorbed": absorbed.call_count}


def fully_sharded(folder, **options):
    """Losses of a few steps on half of the batch each; then the logits of tokens that are read at once and by steps."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate itself chooses FSDP on GPUs only; what it then does needs none.
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    losses, model = train(AutoModelForCausalLM.from_pretrained(folder, **options), accelerator)
    model.eval()
    with counted_absorption() as absorbed:
        logits = [read(model, sizes, DynamicCache(config=model.config)) for sizes in ([22], [16, 1, 1, 1, 1, 1, 1])]
    return {"losses": losses, "layer": type(model.model.layers[0]).__name__, "logits": logits, "absorbed": absorbed.call_count}


def fork():
    """Become two processes, which find their places in the environment as from torchrun; returns the other one, or 0 in that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    rank = "0" if child else "1"
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= places | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return child


def together(folder, native, file):
    """What both do with a converted model and with an MLA model of the library, saved in a file; the exit code."""
    child = fork()
    torch.set_num_threads(1)
    results = {"tensor parallel": tensor_parallel(folder), "fully sharded": fully_sharded(folder)}
    results["native"] = native_tensor_parallel(native)
    results["native, fully sharded"] = fully_sharded(native, attn_implementation="hf_mla")
    torch.distributed.destroy_process_group()
    if not child:
        return 0
    torch.save(results, file)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
