"""Parameters that are split over ranks: the sums that need all shards, and whole states."""
