"""Reinforcement learning of autoregressive image generators."""
