# SPDX-License-Identifier: Apache-2.0
"""What all studies share: experiments, training, storage, comparison."""
