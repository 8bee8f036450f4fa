"""Token-level Direct Preference Optimization without a full-vocabulary probability tensor. Start at README.md."""

from fused_tdpo.heads import LMHead
from fused_tdpo.linear_losses import LinearDPOLoss, LinearTDPOLoss
from fused_tdpo.losses import DPOLoss, TDPOLoss
from fused_tdpo.ops import linear_token_stats, token_stats
from fused_tdpo.types import PreferenceOutput, TokenStats

__version__ = "0.1.0"

__all__ = [
    "DPOLoss",
    "LMHead",
    "LinearDPOLoss",
    "LinearTDPOLoss",
    "PreferenceOutput",
    "TDPOLoss",
    "TokenStats",
    "linear_token_stats",
    "token_stats",
]
