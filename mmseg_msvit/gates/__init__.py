"""Who decides which regions are coarse, and what teaches them."""
