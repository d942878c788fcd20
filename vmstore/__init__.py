"""Images: their names, the catalog of them in etcd, and what is done with them."""
