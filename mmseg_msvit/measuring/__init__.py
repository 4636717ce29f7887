"""Tokens, multiply-accumulates and pictures of a running model."""
