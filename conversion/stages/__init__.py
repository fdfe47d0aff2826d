# SPDX-License-Identifier: Apache-2.0
"""What a conversion does, one after the other."""
