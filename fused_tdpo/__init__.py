"""Token-level Direct Preference Optimization without a full-vocabulary probability tensor. Start at README.md."""

from fused_tdpo.heads import LMHead
from fused_tdpo.linear_losses import LinearDPOLoss, LinearTDPOLoss
from fused_tdpo.losses import DPOLoss, TDPOLoss
from fused_tdpo.ops import linear_token_stats, token_stats
from fused_tdpo.reference_free import CPOLoss, LinearCPOLoss, LinearORPOLoss, LinearSimPOLoss, ORPOLoss, SimPOLoss
from fused_tdpo.ti_dpo import LinearTIDPOLoss, TIDPOLoss, token_importance
from fused_tdpo.types import PreferenceOutput, TokenStats, UnpairedOutput
from fused_tdpo.unpaired import BCOLoss, KTOLoss, LinearBCOLoss, LinearKTOLoss, kto_reference_point

__version__ = "0.1.0"

__all__ = [
    "BCOLoss",
    "CPOLoss",
    "DPOLoss",
    "KTOLoss",
    "LMHead",
    "LinearBCOLoss",
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
    "LinearTDPOLoss",
    "LinearTIDPOLoss",
    "ORPOLoss",
    "PreferenceOutput",
    "SimPOLoss",
    "TDPOLoss",
    "TIDPOLoss",
    "TokenStats",
    "UnpairedOutput",
    "kto_reference_point",
    "linear_token_stats",
    "token_importance",
    "token_stats",
]
