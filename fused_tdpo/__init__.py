"""Token-level Direct Preference Optimization without a full-vocabulary probability tensor. Start at README.md."""

from fused_tdpo.losses import DPOLoss, TDPOLoss
from fused_tdpo.ops import token_stats
from fused_tdpo.types import PreferenceOutput, TokenStats

__version__ = "0.1.0"

__all__ = ["DPOLoss", "PreferenceOutput", "TDPOLoss", "TokenStats", "token_stats"]
