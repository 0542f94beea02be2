"""Problem 3 (Fall 2024): CLIP zero-shot, and new words for concepts that a few pictures show."""
