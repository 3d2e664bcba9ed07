# SPDX-License-Identifier: Apache-2.0
"""Convex problems to high precision, beside the solvers of other packages."""
