"""The interface of DeepEP 1.2.1 (deepseek-ai/DeepEP, commit 567632d) on SwiftEP, for the ranks of one host.

    import swiftep.deep_ep as deep_ep

`docs/deep_ep.md` says what is the same, what is better and what is missing.
"""

import torch

from .buffer import Buffer
from .config import Config
from .utils import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

#: The dtype of top-k indices.
topk_idx_t = torch.int64
