"""What the tools are made of: no part of a model imports it."""
