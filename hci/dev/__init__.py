"""A whole cluster on one machine, for development, tests and the demo.

etcd, nodes and gateways run as background processes that nothing restarts by itself, so that one
can be killed to see what happens. Everything is in one folder but for the sockets, whose paths have
a length limit.
"""
