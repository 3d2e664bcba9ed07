# SPDX-License-Identifier: Apache-2.0
"""Convex problems to high precision, compared with other packages."""
