"""Measures the product against its peers, in one run on one machine.

Absolute figures move from machine to machine; what counts are ratios between systems that were
measured in turn. Nothing here is asserted by a test; `make bench-smoke` compares with a release.
"""
