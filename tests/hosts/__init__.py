"""A cluster whose members have networks of their own, so that networks can fail.

`switch` makes the namespaces and carries frames where a line is bad, `network` is how a test tells
it what should fail, and `cluster` runs etcd, nodes, gateways and an arbiter on it.
"""
