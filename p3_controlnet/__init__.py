"""Problem 3 (Fall 2025): a ControlNet that puts circles where a hint says."""
