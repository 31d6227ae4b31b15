"""The routes change and read this state through one contract, `service/contract.Hub`."""
