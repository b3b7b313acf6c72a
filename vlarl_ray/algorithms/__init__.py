"""Policy-gradient algorithms: numbers in (`make_batch`), one pure loss out."""
