"""Pure policy: ids, geometry, placement, membership, healing. Nothing here does I/O."""
