# SPDX-License-Identifier: Apache-2.0
"""Comparisons of the methods on real data; see README.md."""
