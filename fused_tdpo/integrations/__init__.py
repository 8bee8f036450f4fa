"""Trainers with the losses inside: `fused_tdpo.integrations.trl` and `fused_tdpo.integrations.transformers`."""
