"""Runs on a cluster that others started: what is sent there, what supervises it there, what comes back."""
