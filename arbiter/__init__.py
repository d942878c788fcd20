"""The thin arbiter: a witness that holds a few bytes per image and replica set, and no data."""
