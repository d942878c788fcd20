"""Cluster state in etcd: keys and records (pure), the client, leases, watches, a verified fake."""
