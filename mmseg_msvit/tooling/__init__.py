"""What the tools are made of: no part of a model, and nothing outside imports it."""
