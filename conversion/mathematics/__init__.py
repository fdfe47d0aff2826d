# SPDX-License-Identifier: Apache-2.0
"""What is computed: the closed form, its fit to the original, and distillation."""
