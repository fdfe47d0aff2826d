"""What tests/test_integration.py has two processes do together, started by torchrun; the first one saves the results.

Arguments: the folder of a converted model, that of an MLA model of the library, and the file to write.
"""

import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from native_models import read
from test_integration import counted_absorption, speak, train
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from hf_mla import cache_of


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


if __name__ == "__main__":
    folder, native, file = sys.argv[1:]
    results = {"tensor parallel": tensor_parallel(folder), "fully sharded": fully_sharded(folder)}
    results["native"] = native_tensor_parallel(native)
    results["native, fully sharded"] = fully_sharded(native, attn_implementation="hf_mla")
    if torch.distributed.get_rank() == 0:
        torch.save(results, file)
    torch.distributed.destroy_process_group()
