"""``run`` generates a text dense and pruned; ``demo`` also compares it with other programs."""
