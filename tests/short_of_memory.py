"""The program `hf-mla` where no memory is free for hidden states, which are then kept in files."""

import sys

from hf_mla_conversion.cli import main
from hf_mla_conversion.source import streaming


streaming.MEMORY_SHARE = 0
sys.exit(main(sys.argv[1:]))
