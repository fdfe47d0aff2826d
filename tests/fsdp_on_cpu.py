"""The program `hf-mla` with FSDP2 on CPUs, for which Accelerate itself chooses it on GPUs only; what it then does needs none."""

import sys

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_mla_conversion.cli import main
from hf_mla_conversion.mathematics.distill import DistillationTrainer


begin, keep_best = AcceleratorState.__init__, DistillationTrainer.keep_best


def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or self._shared_state.get("fsdp_plugin")
    if plugin is not None:
        self._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}


def keep_best_sharded(self):
    decoder = self.accelerator.unwrap_model(self.model_wrapped).get_decoder()
    assert type(decoder.layers[0]).__name__.startswith("FSDP"), "nothing is sharded"
    keep_best(self)


AcceleratorState.__init__, DistillationTrainer.keep_best = begin_sharded, keep_best_sharded
sys.exit(main(sys.argv[1:]))
