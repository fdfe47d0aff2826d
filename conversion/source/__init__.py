# SPDX-License-Identifier: Apache-2.0
"""Reading: checkpoints, models, tokenizers and text."""
