# SPDX-License-Identifier: Apache-2.0
"""A module for each study: its experiments, and a table and figure of them."""
