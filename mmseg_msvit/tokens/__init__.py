"""Where tokens are, and how they get there: map, selection, embedding, positions, and the way back to the grid."""
