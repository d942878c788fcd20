"""Images as a person knows them: names, sizes, leases, import and export."""
