"""State: what the routes change and read, through the one contract `service/contract.Hub`."""
