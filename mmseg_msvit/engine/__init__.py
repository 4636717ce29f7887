"""What a runner calls: hooks, and the constructor of an optimizer."""
