"""What people look at after a run: films and a one-page HTML report."""
