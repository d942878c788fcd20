"""Cluster state in etcd: records and keys, transactions, leases, watches, and a verified fake."""
