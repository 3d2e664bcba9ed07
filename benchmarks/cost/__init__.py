# SPDX-License-Identifier: Apache-2.0
"""Cost of steps: time, bytes, memory, and collective operations."""
