"""Programs that measure what tests only bound."""
