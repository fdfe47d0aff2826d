# SPDX-License-Identifier: Apache-2.0
"""What is left on disk, and what is reported."""
