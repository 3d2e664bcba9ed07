# SPDX-License-Identifier: Apache-2.0
"""What steps cost: time, bytes, memory, and collective operations."""
