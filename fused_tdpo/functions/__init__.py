"""Autograd around the kernels, one file for each op. Importing this registers the ops with `torch.library`."""

from fused_tdpo.functions.linear_token_stats import LinearTokenStatsFunction
from fused_tdpo.functions.token_stats import TokenStatsFunction

__all__ = ["LinearTokenStatsFunction", "TokenStatsFunction"]
