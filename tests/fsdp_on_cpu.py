"""The program `hf-mla` with FSDP2 on CPUs, for which Accelerate itself chooses it on GPUs only; what it then does needs none."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_mla_conversion.cli import main
from hf_mla_conversion.mathematics.distill import DistillationTrainer


def shard_on_cpus():
    """Have Accelerate shard a model between processes on CPUs as it would on GPUs."""
    begin = AcceleratorState.__init__

    def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
        if plugin is not None:
            self._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    AcceleratorState.__init__ = begin_sharded


def check_sharding():
    """Fail where a model that is trained is not sharded."""
    keep_best = DistillationTrainer.keep_best

    def keep_best_sharded(self):
        decoder = self.accelerator.unwrap_model(self.model_wrapped).get_decoder()
        assert type(decoder.layers[0]).__name__.startswith("FSDP"), "nothing is sharded"
        keep_best(self)

    DistillationTrainer.keep_best = keep_best_sharded


if __name__ == "__main__":
    shard_on_cpus()
    check_sharding()
    sys.exit(main(sys.argv[1:]))
