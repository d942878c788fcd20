"""Hosts that boot a real systemd, set up by the collection in `ansible/`, as people would do it."""
