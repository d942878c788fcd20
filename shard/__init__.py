"""Vocabulary and pure policy: ids, geometry, placement, membership, digests.

Nothing here opens a file or a socket, reads a clock, draws a random number, or logs.
"""
