"""What the laboratory in tools/lab is made of: ways of choosing tokens, against each other."""
