"""The vision transformers over packed tokens, and the heads that read tokens."""
