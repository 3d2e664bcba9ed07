# SPDX-License-Identifier: Apache-2.0
"""Data sets: arrays in memory, sources of images, streams of batches."""
