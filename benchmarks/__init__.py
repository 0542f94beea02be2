"""The same work, ours beside a peer's, in one run."""
