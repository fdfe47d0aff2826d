# SPDX-License-Identifier: Apache-2.0
"""The commands of `hf-mla`: a file for each, with a function of the same name."""
