"""The thin arbiter: a witness for sites with two data nodes. It holds a few bytes per image."""
