"""Tasks, episodes, env workers and the ledger that accounts for them."""
